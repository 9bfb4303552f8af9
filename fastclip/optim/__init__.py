"""The optimiser: what decays, the towers' rates, the schedule, and whose code runs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastclip import nvidia_apex
from fastclip.models.clip import Clip, tower_of
from fastclip.optim.compact import CompactAdamW, store_compactly
from fastclip.optim.guarded import GuardedOptimizer
from fastclip.optim.lamb import Lamb

logger = logging.getLogger("fastclip")

__all__ = [
    "CompactAdamW",
    "DeepSpeedOptimizer",
    "GuardedOptimizer",
    "Lamb",
    "OptimConfig",
    "apex_optimizer",
    "build_optimizer",
    "learning_rate_at",
    "parameter_groups",
    "set_learning_rate",
    "store_compactly",
]

Algorithm = Literal["adamw", "compact_adamw", "lamb", "muon"]
Implementation = Literal["auto", "torch", "apex", "deepspeed"]
_WRITTEN_BY: dict[str, tuple[str, ...]] = {
    "adamw": ("auto", "torch", "apex", "deepspeed"),
    "compact_adamw": ("auto",),
    "lamb": ("auto", "torch", "apex"),
    "muon": ("auto", "deepspeed"),
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Which optimiser, and its schedule; AdamW with linear warm-up and cosine decay is the paper's
    (arXiv 2103.00020, section 2.5 and Table 18)."""

    algorithm: Algorithm = "adamw"
    """adamw; compact_adamw, with weights, gradients and statistics in bfloat16 (8 bytes a
    parameter; gradients of micro-batches are added up in it too, and rounded each time); lamb;
    muon for the blocks' matrices and AdamW for the rest, by DeepSpeed (such a run resumes at the
    same ZeRO stage and number of ranks only)."""

    implementation: Implementation = "auto"
    """Whose code: torch's fused one or ours (torch, auto), NVIDIA apex's, or DeepSpeed's (whose
    runs go on from a checkpoint to within rounding, not to the bit)."""

    learning_rate: float = 5e-4
    """Peak learning rate."""

    muon_learning_rate: float = 0.02
    """Peak learning rate of what Muon updates."""

    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""

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

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} is positive, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is in [0, 1), not {getattr(self, name)}")
        for name in ("weight_decay", "visual_lr_scale", "text_lr_scale", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} is not negative, but {getattr(self, name)}")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"optim.final_lr_fraction is in [0, 1], not {self.final_lr_fraction}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"optim.schedule is cosine or constant, not {self.schedule!r}")
        if self.algorithm not in get_args(Algorithm):
            raise ValueError(
                f"optim.algorithm is one of {', '.join(get_args(Algorithm))}, not "
                f"{self.algorithm!r}"
            )
        if self.implementation not in _WRITTEN_BY[self.algorithm]:
            raise ValueError(
                f"optim.implementation of {self.algorithm} is one of "
                f"{', '.join(_WRITTEN_BY[self.algorithm])}, not {self.implementation!r}"
            )

    @property
    def needs_deepspeed(self) -> bool:
        """Whether DeepSpeed makes the optimiser."""
        return self.algorithm == "muon" or self.implementation == "deepspeed"

    @property
    def bytes_per_parameter(self) -> int:
        """Of gradient and statistics, beside the weight itself."""
        return 6 if self.algorithm == "compact_adamw" else 12


@dataclass(frozen=True)
class DeepSpeedOptimizer:
    """An optimiser that DeepSpeed is to make."""

    kind: Literal["AdamW", "Muon"]
    """DeepSpeed's name of it."""

    arguments: dict[str, Any]
    groups: list[dict[str, Any]]
    """As `parameter_groups` gives them."""


def parameter_groups(model: Clip, config: OptimConfig) -> list[dict[str, Any]]:
    """Trained parameters by tower and by whether they decay, in a fixed order.

    Vectors (gains, biases, the class token) and logit parameters do not decay; matrices,
    convolutions and embeddings do. Each group carries its ``name`` and ``lr_scale``.

    With Muon the matrices of transformer blocks are groups of their own; what is looked up, and the
    first and last layers, stay AdamW's. Their decay a step is the same as the others'.
    """
    scales = {"visual": config.visual_lr_scale, "text": config.text_lr_scale, "logit": 1.0}
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = tower_of(name)
            decays = parameter.ndim > 1 and tower != "logit"
            hidden = config.algorithm == "muon" and parameter.ndim == 2 and ".blocks." in name
            groups.setdefault((tower, decays, hidden), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{tower}/{'decay' if decays else 'no_decay'}{'/muon' if hidden else ''}",
            "lr_scale": scales[tower],
            "weight_decay": config.weight_decay if decays else 0.0,
            **(_muon_settings(config, hidden, scales[tower]) if config.algorithm == "muon" else {}),
        }
        for (tower, decays, hidden), parameters in groups.items()
    ]


def _muon_settings(config: OptimConfig, hidden: bool, lr_scale: float) -> dict[str, Any]:
    """What DeepSpeed's Muon wants to read in a group."""
    if not hidden:
        return {
            "use_muon": False,
            "lr": config.learning_rate,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
        }
    ratio = config.muon_learning_rate / config.learning_rate
    return {
        "use_muon": True,
        "lr": config.muon_learning_rate,
        "lr_scale": lr_scale * ratio,
        "momentum": config.muon_momentum,
        "weight_decay": config.weight_decay / ratio,
    }


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer | DeepSpeedOptimizer:
    """The optimiser over `groups`, or what DeepSpeed has to know to make it.

    Raises:
        ImportError: apex was asked for and is not built.
    """
    arguments: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.algorithm == "muon":
        return DeepSpeedOptimizer("Muon", {}, groups)
    if config.implementation == "deepspeed":
        return DeepSpeedOptimizer("AdamW", arguments, groups)
    if config.implementation == "apex":
        fused = apex_optimizer(config)
        if config.algorithm == "lamb":
            return fused(groups, max_grad_norm=0.0, **arguments)  # clipping is the engine's
        return fused(groups, adam_w_mode=True, **arguments)
    if config.algorithm == "lamb":
        return Lamb(groups, **arguments)
    if config.algorithm == "compact_adamw":
        if device.type == "cpu":
            logger.warning("compact_adamw runs in plain PyTorch on a CPU, where it is slow")
        return CompactAdamW(groups, **arguments)
    return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"), **arguments)


def apex_optimizer(config: OptimConfig) -> Any:
    """The class of apex that does `config.algorithm`.

    Raises:
        ImportError: apex is not built.
    """
    name = "FusedLAMB" if config.algorithm == "lamb" else "FusedAdam"
    fused = nvidia_apex.find_optimizer(name)
    if fused is None:
        raise ImportError(
            f"optim.implementation=apex {nvidia_apex.ADVICE}: build it, or set "
            "optim.implementation=torch"
        )
    return fused


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
