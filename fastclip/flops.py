"""How much arithmetic a pair costs, and how much a device can do: the two sides of MFU.

A multiply-add counts as two operations. Matrix products and convolutions are counted, attention's
two products included (a causal mask halves the useful part, but the whole square is counted, as is
usual); normalisations, activations and the loss are not. Training is three forwards: backward
computes two products for each one of forward. Recomputation is not counted as useful work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from fastclip.models.vit import kept_patches

# Dense peaks in TFLOP/s from the vendors' data sheets: (name contains, bf16 and fp16, tf32, fp32).
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    ("B200", 2250.0, 1100.0, 75.0),
    ("H200", 989.5, 494.7, 67.0),
    ("H100 PCIe", 756.0, 378.0, 51.0),
    ("H100 NVL", 835.5, 417.7, 60.0),
    ("H100", 989.5, 494.7, 67.0),
    ("A100", 312.0, 156.0, 19.5),
    ("L40S", 362.0, 183.0, 91.6),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("A10G", 70.0, 35.0, 31.2),
    ("V100", 125.0, 15.7, 15.7),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of `device` in FLOP/s for "bf16", "fp16" or "fp32"; None if it is not known."""
    if device.type != "cuda":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device), precision)


def peak_flops_by_name(name: str, precision: str) -> float | None:
    """As `peak_flops`, for a device's name as CUDA reports it."""
    for part, half, tf32, single in _PEAKS:
        if all(word in name for word in part.split()):
            if precision in ("bf16", "fp16"):
                return half * 1e12
            return (tf32 if torch.backends.cuda.matmul.allow_tf32 else single) * 1e12
    return None


def training_flops_per_sample(config: ClipConfig, text_length: float | None = None) -> float:
    """FLOP of forward and backward for one pair, both towers, as they are counted everywhere.

    Args:
        text_length: tokens a text is computed with; None is the whole context.
    """
    return 3 * (vision_flops(config) + text_flops(config, text_length))


def executed_flops_per_sample(
    config: ClipConfig,
    text_lengths: Sequence[int] | None = None,
    *,
    last_row: bool = True,
    patch_dropout: float = 0.0,
) -> float:
    """FLOP of forward and backward that a pair costs with what need not be computed left out.

    Args:
        text_lengths: tokens that each of some texts is computed with; None is the whole context.
        last_row: whether the last blocks compute the row alone that is read out.
        patch_dropout: share of the patches that are dropped.
    """
    lengths = Counter(text_lengths or [config.text.context_length])  # few: this runs every step
    texts = sum(
        count * text_flops(config, length, last_row=last_row) for length, count in lengths.items()
    )
    image = vision_flops(config, last_row=last_row, patch_dropout=patch_dropout)
    return 3 * (image + texts / lengths.total())


def vision_flops(
    config: ClipConfig, *, last_row: bool = False, patch_dropout: float = 0.0
) -> float:
    """Forward FLOP of one image; a ResNet has no `last_row` and no patches."""
    if isinstance(config.vision, ResNetConfig):
        return _resnet_flops(config.vision, config.embed_dim)
    vision = config.vision
    patches = vision.grid_size**2
    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.width
    tokens = kept_patches(patches, patch_dropout) + 1
    return embedding + _transformer(vision, tokens, last_row) + _projection(config, vision.width)


def text_flops(config: ClipConfig, length: float | None = None, *, last_row: bool = False) -> float:
    """Forward FLOP of one text of `length` tokens (default: the whole context)."""
    text = config.text
    tokens = text.context_length if length is None else length
    return _transformer(text, tokens, last_row) + _projection(config, text.width)


def loss_flops(global_batch_size: int, embed_dim: int) -> float:
    """FLOP of one contrastive loss over all ranks, forward and backward by recomputation (4u)."""
    return 8.0 * global_batch_size**2 * embed_dim


def _transformer(config: ViTConfig | TextConfig, tokens: float, last_row: bool) -> float:
    last = _block(config, 1 if last_row else tokens, tokens)
    return (config.layers - 1) * _block(config, tokens, tokens) + last


def _block(config: ViTConfig | TextConfig, rows: float, tokens: float) -> float:
    """A block of which `rows` come out and that sees `tokens`."""
    width = config.width
    linear = 2 * rows * (2 * width**2 + 2 * width * config.mlp_width) + 2 * tokens * 2 * width**2
    attention = 2 * 2 * rows * tokens * width
    return linear + attention


def _projection(config: ClipConfig, width: int) -> float:
    if config.projection == "mlp":
        return 2 * (width**2 + width * config.embed_dim)
    return 2 * width * config.embed_dim


def _resnet_flops(config: ResNetConfig, embed_dim: int) -> float:
    def convolution(side: int, inputs: int, outputs: int, kernel: int) -> float:
        return 2 * side**2 * inputs * outputs * kernel**2

    half, width = config.width // 2, config.width
    side = config.image_size // 2
    total = convolution(side, 3, half, 3) + convolution(side, half, half, 3)
    total += convolution(side, half, width, 3)
    side //= 2
    channels = width
    for stage, blocks in enumerate(config.layers):
        planes = width * 2**stage
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            total += convolution(side, channels, planes, 1)
            total += convolution(side, planes, planes, 3)  # anti-aliased: strides come after it
            total += convolution(side // stride, planes, 4 * planes, 1)
            if block == 0:
                total += convolution(side // stride, channels, 4 * planes, 1)
            side //= stride
            channels = 4 * planes
    positions = side**2 + 1
    # One query, all positions as keys and values, then the output projection.
    total += 2 * channels**2 * (1 + 2 * positions) + 2 * 2 * positions * channels
    return total + 2 * channels * embed_dim
