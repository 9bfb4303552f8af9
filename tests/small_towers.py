"""A model for tests of the engine, small enough to follow by hand."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from fastclip.engine import EngineConfig
from fastclip.models.clip import ClipOutput

Place = Literal["plain", 0, 1, 2, 3]
"""The plain engine, or DeepSpeed at a ZeRO stage."""


def engine_config(place: Place, **settings: Any) -> EngineConfig:
    """Settings that get exactly this engine."""
    if place == "plain":
        return EngineConfig(backend="plain", **settings)
    return EngineConfig(backend="deepspeed", zero_stage=place, **settings)


class Towers(nn.Module):
    """Two linear towers with the interface of `Clip`, small enough to follow by hand."""

    autocast_dtype: torch.dtype | None = None

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.text = nn.Linear(8, 4)
        self.logit_scale = nn.Parameter(torch.tensor([1.0]))

    def forward(self, images=None, tokens=None) -> ClipOutput:
        return ClipOutput(self.visual(images), self.text(tokens), self.logit_scale.exp(), None)


def product_loss(output: ClipOutput, pairs: int) -> torch.Tensor:
    assert output.image_features is not None
    assert output.text_features is not None
    return ((output.image_features * output.text_features).sum() * output.logit_scale)[0] / pairs


def adamw(model: nn.Module, fused: bool = True) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, fused=fused)
