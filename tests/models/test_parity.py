"""Features and every gradient agree with transformers' CLIPModel and open_clip, weights copied.

``pytest -s`` prints the worst relative error of each case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig as HuggingFaceConfig
from transformers import CLIPModel

from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from fastclip.models.interop_config import to_huggingface, to_open_clip
from fastclip.models.interop_names import Layout, from_fastclip, to_fastclip
from fastclip.models.presets import PRESETS
from fastclip.models.resnet import ModifiedResNet

TOLERANCE = 1e-5
BATCH = 5


class Parity(NamedTuple):
    """Worst relative errors over tensors, ‖Δ‖ / max(‖reference‖, 1e-6 × norm of all gradients)."""

    features: float
    gradients: float
    statistics: float


def vit_config(activation: str = "quick_gelu") -> ClipConfig:
    """Odd sizes everywhere: 3×3 patches of 7 pixels, heads of 11 channels, a ragged MLP."""
    return ClipConfig(
        embed_dim=23,
        vision=ViTConfig(
            image_size=21,
            patch_size=7,
            width=33,
            layers=3,
            heads=3,
            mlp_ratio=3.1,
            activation=activation,  # pyright: ignore[reportArgumentType]
        ),
        text=TextConfig(
            context_length=13,
            vocab_size=101,
            width=26,
            heads=2,
            layers=2,
            mlp_ratio=2.7,
            activation=activation,  # pyright: ignore[reportArgumentType]
        ),
    )


def resnet_config() -> ClipConfig:
    return ClipConfig(
        embed_dim=23,
        vision=ResNetConfig(image_size=64, layers=(1, 2, 1, 2), width=6, heads=3),
        text=TextConfig(context_length=13, vocab_size=101, width=26, heads=2, layers=2),
    )


def randomize(model: nn.Module) -> None:
    """Give every parameter and statistic its own value, those that start at 0 or 1 too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "logit" not in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.abs() * 0.3 if "running_var" in name else noise * 0.05)


def batch(config: ClipConfig, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised images and texts of several lengths, ended by the largest id, zeros after it."""
    generator = torch.Generator().manual_seed(3)
    text = config.text
    length = text.context_length if length is None else length
    side = config.vision.image_size
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    tokens = torch.randint(1, text.vocab_size - 1, (BATCH, length), generator=generator)
    for row in range(BATCH):
        end = min(3 + 2 * row, length - 1)
        tokens[row, end] = text.vocab_size - 1
        tokens[row, end + 1 :] = 0
    return images, tokens


def contrastive(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T
    labels = torch.arange(logits.shape[0])
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)


def huggingface_features(model: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    output = model.get_image_features(images).pooler_output
    return output, model.get_text_features(tokens).pooler_output


def open_clip_features(model: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return model.encode_image(images), model.encode_text(tokens)


def build_huggingface(config: ClipConfig) -> nn.Module:
    return CLIPModel(HuggingFaceConfig(**to_huggingface(config)))


def build_open_clip(config: ClipConfig) -> nn.Module:
    return open_clip.CLIP(**to_open_clip(config)["model_cfg"])


def relative_error(ours: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm()) / max(float(reference.norm()), floor)


def worst(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    assert ours.keys() == reference.keys()
    total = math.sqrt(sum(float(tensor.double().norm()) ** 2 for tensor in reference.values()))
    return max(relative_error(ours[name], reference[name], 1e-6 * total) for name in reference)


def measure(
    config: ClipConfig,
    layout: Layout,
    build: Callable[[ClipConfig], nn.Module],
    features: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    training: bool = True,
    channels_last: bool = False,
) -> Parity:
    """One forward and backward of the peer and of ours with the peer's weights."""
    peer = build(config).train(training)
    randomize(peer)
    ours = Clip(config).train(training)
    ours.load_state_dict(to_fastclip(peer.state_dict(), layout))
    if isinstance(ours.visual, ModifiedResNet) and not channels_last:
        ours.visual.memory_format = torch.contiguous_format
    images, tokens = batch(config)

    expected = features(peer, images, tokens)
    contrastive(*expected, peer.get_parameter("logit_scale").exp()).backward()
    output = ours(images, tokens, normalize=False)
    contrastive(output.image_features, output.text_features, output.logit_scale).backward()

    feature_error = max(
        relative_error(output.image_features, expected[0]),
        relative_error(output.text_features, expected[1]),
    )
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    reference = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(ours.parameters()))
    statistics = to_fastclip(dict(peer.named_buffers()), layout)
    buffers = dict(ours.named_buffers())
    return Parity(
        features=feature_error,
        gradients=worst(gradients, to_fastclip(reference, layout)),
        statistics=max(
            (relative_error(buffers[n], statistics[n], 1e-6) for n in statistics),
            default=0.0,
        ),
    )


_HUGGINGFACE = ("huggingface", build_huggingface, huggingface_features)
_OPEN_CLIP = ("open_clip", build_open_clip, open_clip_features)

CASES: dict[str, Callable[[], Parity]] = {
    "ViT huggingface quick_gelu": lambda: measure(vit_config(), *_HUGGINGFACE),
    "ViT huggingface gelu": lambda: measure(vit_config("gelu"), *_HUGGINGFACE),
    "ViT open_clip quick_gelu": lambda: measure(vit_config(), *_OPEN_CLIP),
    "ViT open_clip gelu": lambda: measure(vit_config("gelu"), *_OPEN_CLIP),
    "ResNet open_clip training": lambda: measure(resnet_config(), *_OPEN_CLIP),
    "ResNet open_clip evaluation": lambda: measure(resnet_config(), *_OPEN_CLIP, training=False),
}


@pytest.mark.parametrize("case", CASES)
def test_features_and_gradients_agree_with_peers(case):
    parity = CASES[case]()
    print(
        f"\nparity {case:28s} features {parity.features:.0e}  gradients {parity.gradients:.0e}  "
        f"statistics {parity.statistics:.0e}"
    )
    assert max(parity) <= TOLERANCE


def test_channels_last_costs_a_digit_at_most():
    """The default: torch's channels-last BatchNorm, which sums less exactly on a CPU."""
    parity = measure(resnet_config(), *_OPEN_CLIP, channels_last=True)
    assert parity.features <= TOLERANCE
    assert parity.gradients <= 10 * TOLERANCE


@pytest.mark.parametrize("config", [vit_config(), resnet_config()], ids=["ViT", "ResNet"])
def test_a_wrong_weight_is_seen(config):
    """The measure notices one parameter that is off by a thousandth."""
    peer = build_open_clip(config)
    weights = to_fastclip(peer.state_dict(), "open_clip")
    name = "text.blocks.1.mlp.fc.bias"
    wrong = {**weights, name: weights[name] * 1.001}
    assert worst(wrong, weights) > 10 * TOLERANCE


@pytest.mark.parametrize("name", [name for name in PRESETS if "Nano" not in name])
def test_parameter_counts_of_the_papers_models_equal_open_clips(name):
    config = PRESETS[name]
    with torch.device("meta"):
        ours = Clip(config).state_dict()
        peer = build_open_clip(config).state_dict()
        named = open_clip.get_model_config(name)
        assert named is not None
        published = open_clip.CLIP(
            **{**named, "vision_cfg": dict(named["vision_cfg"])}
        ).state_dict()
    converted = from_fastclip(ours, "open_clip")
    shapes = {key: tensor.shape for key, tensor in converted.items()}
    assert shapes == {key: tensor.shape for key, tensor in peer.items()}
    assert shapes == {key: tensor.shape for key, tensor in published.items()}
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in published.values())
