"""AdamW as in the paper: what decays, at which rate each tower learns, and the schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastclip.models.clip import Clip, tower_of


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay (arXiv 2103.00020, section 2.5 and Table 18)."""

    learning_rate: float = 5e-4
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay of the first moment."""

    beta2: float = 0.98
    """Decay of the second moment; the paper has 0.98 for ViTs and 0.999 for ResNets."""

    eps: float = 1e-6
    """Added to the root of the second moment; the paper has 1e-6 for ViTs, 1e-8 for ResNets."""

    weight_decay: float = 0.2
    """Decoupled decay of everything that is not a gain, a bias or a logit parameter."""

    warmup_steps: int = 2000
    """Steps over which the learning rate rises linearly."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up."""

    final_lr_fraction: float = 0.0
    """Learning rate at the end of the cosine over the peak."""

    visual_lr_scale: float = 1.0
    """Multiplies the image tower's learning rate."""

    text_lr_scale: float = 1.0
    """Multiplies the text tower's learning rate."""

    implementation: Literal["auto", "torch", "apex"] = "auto"
    """AdamW's code: auto and torch take torch's fused one, apex NVIDIA's FusedAdam."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} is positive, not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is in [0, 1), not {getattr(self, name)}")
        for name in ("weight_decay", "visual_lr_scale", "text_lr_scale", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} is not negative, but {getattr(self, name)}")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"optim.final_lr_fraction is in [0, 1], not {self.final_lr_fraction}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"optim.schedule is cosine or constant, not {self.schedule!r}")
        if self.implementation not in ("auto", "torch", "apex"):
            raise ValueError(
                f"optim.implementation is auto, torch or apex, not {self.implementation!r}"
            )


def parameter_groups(model: Clip, config: OptimConfig) -> list[dict[str, Any]]:
    """Trained parameters by tower and by whether they decay, in a fixed order.

    Vectors (gains, biases, the class token) and logit parameters do not decay; matrices,
    convolutions and embeddings do. Each group carries its ``name`` and ``lr_scale``.
    """
    scales = {"visual": config.visual_lr_scale, "text": config.text_lr_scale, "logit": 1.0}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = tower_of(name)
            decays = parameter.ndim > 1 and tower != "logit"
            groups.setdefault((tower, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{tower}/{'decay' if decays else 'no_decay'}",
            "lr_scale": scales[tower],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (tower, decays), parameters in groups.items()
    ]


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over `groups`; which code runs is `optimizer_backend`'s answer."""
    arguments: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.implementation == "apex":
        fused_adam = find_apex_adam()
        if fused_adam is None:
            raise ImportError(
                "optim.implementation=apex needs NVIDIA's apex built with its CUDA extensions "
                "(github.com/NVIDIA/apex; the package of that name on PyPI is another one): build "
                "it, or set optim.implementation=torch"
            )
        return fused_adam(groups, adam_w_mode=True, **arguments)
    return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"), **arguments)


def find_apex_adam() -> Any | None:
    """NVIDIA apex's FusedAdam, or None where its compiled part is missing."""
    try:
        import amp_C  # noqa: F401  # pyright: ignore[reportMissingImports]
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return FusedAdam


def learning_rate_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of the update that follows `step` finished ones.

    Raises:
        ValueError: the warm-up is as long as the run, which would never reach the peak.
    """
    if config.warmup_steps >= total_steps:
        raise ValueError(
            f"optim.warmup_steps={config.warmup_steps} is not shorter than the run's "
            f"{total_steps} steps: lower it or train longer"
        )
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    low = config.final_lr_fraction
    return config.learning_rate * (low + (1 - low) * cosine)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, config: OptimConfig, total_steps: int
) -> float:
    """Set every group's rate for the update after `step`; returns the unscaled one."""
    rate = learning_rate_at(step, config, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate
