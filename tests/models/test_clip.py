"""The root forward: inputs and their errors, precision, the temperature's bound, frozen towers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastclip.models.clip import Clip, ClipOutput, bounded_exp, tower_of
from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig, ViTConfig

TEXT = TextConfig(context_length=8, vocab_size=40, width=16, heads=2, layers=2)
VIT = ClipConfig(
    embed_dim=12,
    vision=ViTConfig(image_size=32, patch_size=8, width=24, layers=2, heads=2),
    text=TEXT,
)
RESNET = ClipConfig(
    embed_dim=12,
    vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=4, heads=4),
    text=TEXT,
)
BOTH = pytest.mark.parametrize("config", [VIT, RESNET], ids=["ViT", "ResNet"])


def pixels(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)


def tokens(batch: int = 3, length: int = 8) -> torch.Tensor:
    ids = torch.randint(1, 39, (batch, length), dtype=torch.int32)
    ids[:, -1] = 39
    return ids


def features(output: ClipOutput) -> tuple[torch.Tensor, torch.Tensor]:
    assert output.image_features is not None
    assert output.text_features is not None
    return output.image_features, output.text_features


@BOTH
def test_shapes_and_names(config):
    model = Clip(dataclasses.replace(config, init_logit_bias=-10))
    output = model(pixels(), tokens())
    for tower in features(output):
        assert tower.shape == (3, 12)
        assert torch.allclose(tower.norm(dim=1), torch.ones(3), atol=1e-6)
    assert output.logit_scale.shape == (1,)
    assert output.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert output.logit_bias is not None
    assert output.logit_bias.tolist() == [-10.0]
    names = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert names == {"visual", "text", "logit_scale", "logit_bias"}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@BOTH
def test_one_tower_alone_gives_the_same_features(config):
    model = Clip(config).eval()
    images, ids = pixels(), tokens()
    both = features(model(images, ids))
    assert torch.equal(model(images=images).image_features, both[0])
    assert torch.equal(model(tokens=ids).text_features, both[1])
    assert model(images=images).text_features is None
    assert model(tokens=ids).image_features is None
    assert model(tokens=ids).logit_bias is None


@BOTH
def test_mlp_projection(config):
    model = Clip(dataclasses.replace(config, projection="mlp"))
    output = model(pixels(), tokens(), normalize=False)
    assert features(output)[0].shape == (3, 12)
    features(output)[0].sum().backward()
    assert sum("proj" in n and p.ndim == 2 for n, p in model.text.named_parameters()) == 4
    assert any(isinstance(module, torch.nn.ReLU) for module in model.visual.proj.modules())


def test_uint8_images_are_normalised_inside():
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.3, 0.2)
    model = Clip(dataclasses.replace(VIT, image_mean=mean, image_std=std))
    images = pixels()
    scaled = images.float() / 255
    normalised = (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    inside = model(images, normalize=False).image_features
    outside = model(normalised, normalize=False).image_features
    assert torch.allclose(inside, outside, rtol=1e-5, atol=1e-6)
    double = model(normalised.double(), normalize=False).image_features
    assert torch.equal(double, outside)
    assert not any("pixel" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("images", "ids", "error", "message"),
    [
        (None, None, ValueError, "images, tokens or both"),
        (torch.zeros(2, 3, 32, 31), None, ValueError, r"3, 32, 32.*\[2, 3, 32, 31\]"),
        (torch.zeros(3, 32, 32), None, ValueError, "batch, 3, 32, 32"),
        (torch.zeros(2, 32, 32, 3), None, ValueError, "batch, 3, 32, 32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), None, TypeError, "uint8"),
        (None, torch.zeros(2, 9, dtype=torch.int64), ValueError, "context length 8"),
        (None, torch.zeros(2, 0, dtype=torch.int64), ValueError, "from 1"),
        (None, torch.zeros(8, dtype=torch.int64), ValueError, "batch, length"),
        (None, torch.zeros(2, 8), TypeError, "int32 or int64"),
        (None, torch.full((2, 8), 40), ValueError, "0 to 39.*40"),
        (None, torch.full((2, 8), -1), ValueError, "0 to 39.*-1"),
    ],
)
def test_unfit_inputs_are_named(images, ids, error, message):
    with pytest.raises(error, match=message):
        Clip(VIT)(images, ids)


@BOTH
def test_an_empty_batch_has_empty_features(config):
    output = Clip(config).eval()(pixels(0), tokens(0))
    assert [tower.shape for tower in features(output)] == [(0, 12), (0, 12)]


@BOTH
@pytest.mark.parametrize("how", ["attribute", "ambient"])
def test_bf16_autocast_stays_near_fp32(config, how):
    model = Clip(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.ones_(parameter)
    images, ids = pixels(8), tokens(8)
    exact = features(model(images, ids))
    seen = []
    hook = model.text.blocks[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    if how == "attribute":
        model.autocast_dtype = torch.bfloat16
        output = model(images, ids)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(images, ids)
    hook.remove()
    assert seen == [torch.bfloat16]
    for tower, reference in zip(features(output), exact, strict=True):
        assert tower.dtype == torch.float32
        assert torch.allclose(tower.norm(dim=1), torch.ones(8), atol=1e-6)
        cosines = (tower * reference).sum(1)
        assert 0.99 < cosines.min() <= cosines.max() < 1.0001
        assert not torch.equal(tower, reference)
    assert output.logit_scale.dtype == torch.float32
    sum(tower.sum() for tower in features(output)).backward()  # pyright: ignore
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in _towers(model))


def _towers(model: Clip):
    return (p for n, p in model.named_parameters() if tower_of(n) != "logit")


def test_layer_norm_computes_in_fp32_under_autocast():
    layer = Clip(VIT).text.ln_final
    x = (torch.randn(4, 16) * 0.01 + 100).bfloat16()
    expected = torch.nn.functional.layer_norm(x.double(), (16,)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_temperature_stays_fp32_under_fp16_autocast():
    model = Clip(VIT)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    with torch.autocast("cpu", dtype=torch.float16):
        scale = model(tokens=tokens()).logit_scale
    assert scale.item() == pytest.approx(math.exp(4.6), rel=1e-6)


@pytest.mark.parametrize(
    ("logarithm", "incoming", "value", "gradient"),
    [
        (2.0, 3.0, math.exp(2.0), 3.0 * math.exp(2.0)),
        (2.0, -3.0, math.exp(2.0), -3.0 * math.exp(2.0)),
        (4.7, 3.0, 100.0, 300.0),  # descent lowers the logarithm: the way back is open
        (4.7, -3.0, 100.0, 0.0),  # descent would raise it further
        (4.7, math.nan, 100.0, math.nan),
    ],
)
def test_bounded_exp(logarithm, incoming, value, gradient):
    parameter = torch.tensor([logarithm], requires_grad=True)
    scale = bounded_exp(parameter, 100.0)
    scale.backward(torch.tensor([incoming]))
    assert parameter.grad is not None
    assert scale.item() == pytest.approx(value, rel=1e-6)
    assert parameter.grad.item() == pytest.approx(gradient, rel=1e-5, nan_ok=True)


def test_temperature_recovers_from_beyond_the_bound():
    """From p = 4.7 > ln 100 a loss that wants a scale of 20 brings it back; a clamp would not."""
    model = Clip(VIT)
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
    optimizer = torch.optim.SGD([model.logit_scale], lr=1e-4)
    ids = tokens(1)
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * (model(tokens=ids).logit_scale - 20.0).square().sum()).backward()
        optimizer.step()
    assert model.logit_scale.item() == pytest.approx(math.log(20.0), abs=0.05)


def test_temperature_does_not_pass_the_bound_far():
    model = Clip(VIT)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    optimizer = torch.optim.SGD([model.logit_scale], lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        (-model(tokens=tokens(1)).logit_scale).sum().backward()
        optimizer.step()
    assert math.log(100.0) < model.logit_scale.item() < math.log(100.0) + 0.11
    assert model(tokens=tokens(1)).logit_scale.item() == pytest.approx(100.0, rel=1e-6)


def test_frozen_tower_learns_nothing_and_keeps_its_statistics():
    model = Clip(RESNET)
    assert model.has_batch_norm
    model.freeze(vision=True, text=False)
    model.train()
    assert not model.has_batch_norm
    assert not any(module.training for module in model.visual.modules())
    assert model.text.training
    before = {name: value.clone() for name, value in model.visual.state_dict().items()}
    output = model(pixels(), tokens())
    (features(output)[0] * features(output)[1]).sum().backward()
    assert all(p.grad is None for p in model.visual.parameters())
    assert all(p.grad is not None for p in model.text.parameters())
    assert all(torch.equal(value, before[n]) for n, value in model.visual.state_dict().items())
    model.freeze(vision=False, text=False)
    assert model.has_batch_norm
    assert model.visual.training
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_in_evaluation_mode_does_not_start_training():
    model = Clip(VIT).eval()
    model.freeze(vision=False, text=True)
    assert not model.training
    assert not model.visual.training
    assert not model.has_batch_norm


def test_every_parameter_has_a_tower():
    model = Clip(dataclasses.replace(RESNET, init_logit_bias=0.0))
    towers = {name: tower_of(name) for name, _ in model.named_parameters()}
    assert towers["logit_scale"] == towers["logit_bias"] == "logit"
    assert set(towers.values()) == {"visual", "text", "logit"}
    with pytest.raises(ValueError, match=r"visual\."):
        tower_of("module.visual.proj.weight")


def test_initial_weights_have_the_papers_spread():
    config = ClipConfig(
        embed_dim=256,
        vision=ViTConfig(image_size=64, patch_size=8, width=256, layers=3, heads=4),
        text=TextConfig(vocab_size=2000, width=256, heads=4, layers=3),
    )
    weights = Clip(config).state_dict()
    width, depth = 256**-0.5, (2 * 3) ** -0.5
    expected = {
        "text.token_embedding.weight": 0.02,
        "text.positional_embedding": 0.01,
        "text.blocks.1.attn.qkv.weight": width,
        "text.blocks.1.attn.out.weight": width * depth,
        "text.blocks.1.mlp.fc.weight": 512**-0.5,
        "text.blocks.1.mlp.proj.weight": width * depth,
        "text.proj.weight": width,
        "visual.positional_embedding": width,
        "visual.blocks.1.attn.out.weight": width * depth,
        "visual.proj.weight": width,
    }
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name
    resnet = Clip(RESNET).state_dict()
    assert resnet["visual.layer1.0.bn3.weight"].abs().max() == 0
    assert resnet["visual.attnpool.query.weight"].std().item() == pytest.approx(128**-0.5, rel=0.05)
