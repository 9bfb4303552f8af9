"""A small model, its inputs, and how far its features and gradients are from fp64's.

The measure is the losses' (relative, against fp64); what is compared is every feature and the
gradient of every parameter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastclip.models.attention import AttentionConfig
from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig, TextConfig, ViTConfig
from fastclip.tokenizer.packing import PackedTokens

END = 95
CONFIG = ClipConfig(
    embed_dim=24,
    vision=ViTConfig(image_size=32, patch_size=8, width=48, layers=3, heads=3),
    text=TextConfig(context_length=77, vocab_size=96, width=64, heads=2, layers=3),
)
LENGTHS = (3, 77, 2, 9, 9, 12, 3, 1, 30, 3)

Gradients = dict[str, Tensor]


def model() -> Clip:
    torch.manual_seed(0)
    made = Clip(CONFIG).train()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and gains too are alive
            parameter.add_(0.02 * torch.randn_like(parameter))
    return made


def token_rows(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, END, (len(lengths), 77), dtype=torch.int32, generator=generator)
    for row, length in zip(rows, lengths, strict=True):
        row[length - 1] = END
        row[length:] = 0
    return rows


def pixels() -> Tensor:
    shape = (len(LENGTHS), 3, 32, 32)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2)).byte()


def run(clip: Clip, tokens: Tensor | PackedTokens | None, images: Tensor | None = None):
    """Features of a tower, and the gradients of a scalar in which all of them count differently."""
    output = clip(images, tokens, normalize=False)
    features = output.text_features if images is None else output.image_features
    weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).reshape(features.shape)
    (features * weights.to(features.device)).sum().backward()
    gradients = {n: p.grad for n, p in clip.named_parameters() if p.grad is not None}
    return features.detach(), gradients


def worst(ours: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> float:
    (features, gradients), (right, right_gradients) = ours, expected
    assert gradients.keys() == right_gradients.keys()
    whole = math.sqrt(sum(float(g.double().norm()) ** 2 for g in right_gradients.values()))
    pairs = [(gradients[name], g) for name, g in right_gradients.items()]
    errors = [float((features.double().cpu() - right).norm() / right.norm())]
    for gradient, g in pairs:
        difference = float((gradient.double().cpu() - g).norm())
        errors.append(difference / max(float(g.norm()), 1e-6 * whole))
    return max(errors)


def plainly(**inputs: Tensor) -> tuple[Tensor, Gradients]:
    """In fp64, all positions through all blocks."""
    clip = model().double()
    clip.set_attention(AttentionConfig(impl="sdpa", last_row=False))
    return run(clip, inputs.get("tokens"), inputs.get("images"))
