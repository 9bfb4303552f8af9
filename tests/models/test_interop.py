"""Weights of four layouts: there and back unchanged, equal features in the library they are for."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from fastclip.models.interop import (
    export_weights,
    init_from,
    load_weights,
    resample_positions,
)
from fastclip.models.interop_infer import infer_config
from fastclip.models.interop_names import (
    LAYOUTS,
    Layout,
    detect_layout,
    from_fastclip,
    to_fastclip,
)

TEXT = TextConfig(context_length=11, vocab_size=60, width=64, heads=1, layers=2)
VIT = ClipConfig(
    embed_dim=20,
    vision=ViTConfig(image_size=32, patch_size=8, width=128, layers=2, heads=2),
    text=TEXT,
)
RESNET = dataclasses.replace(
    VIT, vision=ResNetConfig(image_size=64, layers=(1, 2, 1, 1), width=4, heads=2)
)
PAIRS = [
    pytest.param(config, layout, id=f"{name}-{layout}")
    for name, config in (("ViT", VIT), ("ResNet", RESNET))
    for layout in LAYOUTS
    if (name, layout) != ("ResNet", "huggingface")
]


def build(config: ClipConfig) -> Clip:
    """A model in which no parameter has the value that a new model would have."""
    model = Clip(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn_like(tensor) * 0.05
                tensor.add_(noise.abs() if "running_var" in name else noise)
    return model


def inputs(config: ClipConfig) -> tuple[Tensor, Tensor]:
    side = config.vision.image_size
    tokens = torch.randint(1, 59, (4, config.text.context_length))
    tokens[:, 6] = 59
    tokens[:, 7:] = 0
    tokens[1, 8] = 59
    return torch.randn(4, 3, side, side), tokens


def features(model: Clip, images: Tensor, tokens: Tensor) -> list[Tensor]:
    output = model(images, tokens, normalize=False)
    assert output.image_features is not None
    assert output.text_features is not None
    return [output.image_features, output.text_features]


def peer_features(layout: Layout, directory: Path, images: Tensor, tokens: Tensor) -> list[Tensor]:
    peer: Any
    if layout == "huggingface":
        peer = CLIPModel.from_pretrained(directory).eval()
        images_out = peer.get_image_features(images).pooler_output
        return [images_out, peer.get_text_features(tokens).pooler_output]
    if layout == "open_clip":
        peer = open_clip.create_model(f"local-dir:{directory}").eval()
    else:
        weights = load_file(directory / "model.safetensors")
        peer = build_model_from_openai_state_dict(weights, cast_dtype=torch.float32).float()
    return [peer.encode_image(images), peer.encode_text(tokens)]


@pytest.mark.parametrize(("config", "layout"), PAIRS)
def test_names_there_and_back(config, layout):
    weights = build(config).state_dict()
    theirs = from_fastclip(weights, layout)
    found = detect_layout(theirs)
    assert found == ("open_clip" if layout == "openai" else layout)
    back = to_fastclip({f"module.{name}": tensor for name, tensor in theirs.items()}, found)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert all(back[name].shape == tensor.shape for name, tensor in weights.items())


@pytest.mark.parametrize(("config", "layout"), PAIRS)
def test_an_export_reads_back_equal(config, layout, tmp_path):
    model = build(config)
    export_weights(model, config, tmp_path / "new" / "folder", layout)
    loaded = load_weights(tmp_path / "new" / "folder")
    assert loaded.layout == layout
    assert loaded.config is not None
    temperature = loaded.config.init_temperature
    assert temperature == pytest.approx(config.init_temperature, rel=1e-12)
    assert dataclasses.replace(loaded.config, init_temperature=0.07) == config
    assert loaded.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(("config", "layout"), [p for p in PAIRS if p.values[1] != "fastclip"])
def test_the_target_library_computes_equal_features(config, layout, tmp_path):
    model = build(config)
    if layout == "openai":  # OpenAI's code, and open_clip's reader of it, round weights to fp16
        rounded = {n: t.half().float() for n, t in model.state_dict().items()}
        model.load_state_dict(rounded)
    export_weights(model, config, tmp_path, layout)
    images, tokens = inputs(config)
    with torch.no_grad():
        ours = features(model, images, tokens)
        theirs = peer_features(layout, tmp_path, images, tokens)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 2e-6 * other.norm()


def test_gelu_odd_heads_statistics_and_bias_survive_in_open_clip(tmp_path):
    config = dataclasses.replace(
        VIT,
        vision=ViTConfig(
            image_size=21, patch_size=7, width=33, layers=1, heads=3, mlp_ratio=3.1,
            activation="gelu",
        ),
        text=dataclasses.replace(TEXT, width=26, heads=2, activation="gelu", mlp_ratio=2.5),
        init_logit_bias=-10.0,
        image_mean=(0.5, 0.5, 0.5),
    )  # fmt: skip
    model = build(config)
    export_weights(model, config, tmp_path, "open_clip")
    loaded = load_weights(tmp_path).config
    assert loaded == config
    images, tokens = inputs(config)
    with torch.no_grad():
        for mine, other in zip(
            features(model, images, tokens),
            peer_features("open_clip", tmp_path, images, tokens),
            strict=True,
        ):
            assert (mine - other).norm() <= 2e-6 * other.norm()


def test_open_clips_custom_text_layout_is_read():
    model = build(VIT)
    plain = from_fastclip(model.state_dict(), "open_clip")
    text = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_proj")
    custom = {"text." + n if n.startswith(text) else n: t for n, t in plain.items()}
    custom["text.attn_mask"] = torch.zeros(11, 11)
    peer = open_clip.CustomTextCLIP(
        20,
        {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2},  # pyright: ignore
        {"context_length": 11, "vocab_size": 60, "width": 64, "heads": 1, "layers": 2},  # pyright: ignore
    )
    assert peer.state_dict().keys() == custom.keys() - {"text.attn_mask"}
    assert detect_layout(custom) == "open_clip"
    back = to_fastclip(custom, "open_clip")
    assert all(torch.equal(back[n], t) for n, t in model.state_dict().items())
    assert back.keys() == model.state_dict().keys()


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_configuration_is_inferred_from_shapes(config):
    weights = Clip(config).state_dict()
    assert infer_config(weights, activation="quick_gelu") == config
    odd = dataclasses.replace(config, text=dataclasses.replace(TEXT, width=48, heads=3))
    weights = Clip(odd).state_dict()
    with pytest.raises(ValueError, match="text_heads"):
        infer_config(weights, activation="quick_gelu")
    assert infer_config(weights, activation="quick_gelu", text_heads=3) == odd
    mlp = dataclasses.replace(config, projection="mlp", init_logit_bias=-2.0)
    assert infer_config(Clip(mlp).state_dict(), activation="quick_gelu") == mlp
    del weights["text.positional_embedding"]
    with pytest.raises(ValueError, match=r"lack text\.positional_embedding"):
        infer_config(weights, activation="quick_gelu", text_heads=3)


@pytest.mark.parametrize("layout", ["openai", "open_clip", "huggingface"])
def test_fine_tuning_starts_from_any_layout(layout, tmp_path):
    model = build(VIT)
    export_weights(model, VIT, tmp_path, layout)
    other = Clip(VIT).eval()
    init_from(other, tmp_path)
    images, tokens = inputs(VIT)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            features(other, images, tokens), features(model, images, tokens), strict=True
        )
    )


@pytest.mark.parametrize("side", [16, 48, 64])
def test_another_image_size_resamples_as_open_clip_does(side, tmp_path):
    model = build(VIT)
    export_weights(model, VIT, tmp_path, "fastclip")
    larger = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, image_size=side))
    fine_tuned = Clip(larger)
    init_from(fine_tuned, tmp_path)
    weights = from_fastclip(model.state_dict(), "open_clip")
    peer = open_clip.CLIP(
        20,
        {"image_size": side, "patch_size": 8, "width": 128, "layers": 2},  # pyright: ignore
        {"context_length": 11, "vocab_size": 60, "width": 64, "heads": 1, "layers": 2},  # pyright: ignore
    )
    open_clip.model.resize_pos_embed(weights, peer)
    got = fine_tuned.state_dict()["visual.positional_embedding"]
    assert torch.allclose(got, weights["visual.positional_embedding"], atol=1e-7)


def test_a_resnets_attention_pool_is_resampled_too(tmp_path):
    export_weights(build(RESNET), RESNET, tmp_path, "fastclip")
    larger = dataclasses.replace(RESNET, vision=dataclasses.replace(RESNET.vision, image_size=96))
    model = Clip(larger)
    init_from(model, tmp_path)
    assert model.state_dict()["visual.attnpool.positional_embedding"].shape == (10, 128)


def test_resampling_keeps_the_class_row_and_constants():
    embedding = torch.full((17, 5), 3.0)
    embedding[0] = 7.0
    resampled = resample_positions(embedding, 50)
    assert torch.equal(resampled[0], embedding[0])
    assert torch.allclose(resampled[1:], torch.full((49, 5), 3.0))
    with pytest.raises(ValueError, match="1 \\+ a square"):
        resample_positions(embedding, 51)


def _without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: _without(w, "ln_final.bias"), r"missing text\.ln_final\.bias"),
        (lambda w: {**w, "visual.ls.gamma": torch.ones(1)}, r"left over visual\.ls\.gamma"),
        (lambda w: {**w, "logit_bias": torch.ones(())}, "left over logit_bias"),
        (
            lambda w: {**w, "ln_final.bias": torch.ones(3)},
            r"text\.ln_final\.bias is \[3\] and should be \[64\]",
        ),
    ],
)
def test_init_from_lists_what_does_not_fit(change, message, tmp_path, caplog):
    weights = from_fastclip(build(VIT).state_dict(), "open_clip")
    weights = {name: tensor.contiguous() for name, tensor in change(weights).items()}
    save_file(weights, tmp_path / "weights.safetensors")
    model = Clip(VIT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        caplog.at_level(logging.WARNING, "fastclip"),
        pytest.raises(ValueError, match=message),
    ):
        init_from(model, tmp_path / "weights.safetensors")
    assert "does not say" in caplog.text
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": dataclasses.replace(VIT.vision, heads=4)}, r"vision\.heads is 2 there and 4"),
        ({"text": dataclasses.replace(TEXT, activation="gelu")}, r"text\.activation"),
        ({"image_mean": (0.5, 0.5, 0.5)}, "image_mean"),
        ({"image_std": (0.5, 0.5, 0.5)}, "image_std"),
    ],
)
def test_init_from_refuses_what_shapes_do_not_show(change, message, tmp_path):
    export_weights(build(VIT), VIT, tmp_path, "huggingface")
    with pytest.raises(ValueError, match=message):
        init_from(Clip(dataclasses.replace(VIT, **change)), tmp_path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "pytorch_model.bin"])
def test_torch_files_are_read_without_running_code(name, tmp_path):
    weights = from_fastclip(build(VIT).state_dict(), "open_clip")
    half = {n: t.half() if t.is_floating_point() else t for n, t in weights.items()}
    torch.save({"epoch": 3, "state_dict": half, "optimizer": {"lr": 0.1}}, tmp_path / name)
    loaded = load_weights(tmp_path / name)
    assert loaded.layout == "open_clip"
    assert loaded.config is None
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.float32}
    init_from(Clip(VIT), tmp_path / name)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from a pickle ran",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": _Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        load_weights(tmp_path / "weights.pt")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_needs_permission(tmp_path):
    class Holder(torch.nn.Module):
        def __init__(self, model: Clip) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterDict()
            self.visual = model.visual
            self.text = model.text
            self.logit_scale = model.logit_scale

        def forward(self, x: Tensor) -> Tensor:
            return x

    file = tmp_path / "ViT.pt"
    model = build(VIT)
    torch.jit.trace(Holder(model), torch.zeros(1)).save(file)  # pyright: ignore
    with pytest.raises(ValueError, match="allow_torchscript=True"):
        load_weights(file)
    loaded = load_weights(file, allow_torchscript=True)
    assert loaded.layout == "fastclip"
    assert all(torch.equal(loaded.state_dict[n], t) for n, t in model.state_dict().items())


def test_unreadable_sources_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_weights(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        load_weights(tmp_path)
    for name, content, message in (
        ("a.safetensors", b"\x00" * 20, "safetensors"),
        ("a.pt", b"not a torch file", "more than tensors, or is broken"),
        ("a.onnx", b"", "weights are in"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_weights(tmp_path / name)
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(tmp_path / "list.pt")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: .*conv\.weight"):
        load_weights(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("open_clip", {"model_cfg.vision_cfg.timm_model_name": "vit_base"}, "timm_model_name"),
        ("open_clip", {"model_cfg.text_cfg.no_causal_mask": True}, "no_causal_mask"),
        ("open_clip", {"model_cfg.vision_cfg.image_size": [32, 64]}, "square"),
        ("huggingface", {"model_type": "siglip"}, "siglip"),
        ("huggingface", {"vision_config.hidden_act": "relu"}, "activation"),
        ("huggingface", {"text_config.layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ("fastclip", {"vision.depth": 3}, "depth"),
    ],
)
def test_foreign_options_are_errors(layout, change, message, tmp_path):
    export_weights(build(VIT), VIT, tmp_path, layout)
    names = {"open_clip": "open_clip_config.json", "huggingface": "config.json"}
    file = tmp_path / names.get(layout, "model.json")
    document = json.loads(file.read_text())
    for path, value in change.items():
        *parents, last = path.split(".")
        section = document
        for parent in parents:
            section = section[parent]
        section[last] = value
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path)


def test_defaults_that_open_clip_writes_out_are_understood(tmp_path):
    export_weights(build(VIT), VIT, tmp_path, "open_clip")
    file = tmp_path / "open_clip_config.json"
    document = json.loads(file.read_text())
    document["model_cfg"]["vision_cfg"] |= {"pool_type": "tok", "ls_init_value": None}
    document["model_cfg"]["text_cfg"] |= {"pool_type": "argmax", "no_causal_mask": False}
    file.write_text(json.dumps(document))
    assert load_weights(tmp_path).config == VIT


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (RESNET, "huggingface", "ResNet"),
        (dataclasses.replace(VIT, projection="mlp"), "open_clip", "mlp projection"),
        (dataclasses.replace(VIT, init_logit_bias=-10.0), "huggingface", "logit bias"),
        (dataclasses.replace(VIT, init_logit_bias=-10.0), "openai", "logit bias"),
        (
            dataclasses.replace(VIT, text=dataclasses.replace(TEXT, activation="gelu")),
            "open_clip",
            "different activations",
        ),
        (
            dataclasses.replace(RESNET, text=dataclasses.replace(TEXT, activation="gelu")),
            "openai",
            "quick_gelu",
        ),
        (
            dataclasses.replace(VIT, text=dataclasses.replace(TEXT, heads=2)),
            "openai",
            "64 channels",
        ),
        (dataclasses.replace(VIT, image_mean=(0.5, 0.5, 0.5)), "openai", "image_mean"),
        (VIT, "onnx", "fastclip, openai"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(config, layout, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_weights(Clip(config), config, tmp_path, layout)
    assert not list(tmp_path.iterdir())


def test_exports_do_not_overwrite_and_fit_their_configuration(tmp_path):
    model = build(VIT)
    export_weights(model.state_dict(), VIT, tmp_path, "fastclip")
    with pytest.raises(FileExistsError, match="empty directory"):
        export_weights(model, VIT, tmp_path, "fastclip")
    with pytest.raises(ValueError, match=r"do not fit.*missing visual\.attnpool"):
        export_weights(model, RESNET, tmp_path / "other", "fastclip")
