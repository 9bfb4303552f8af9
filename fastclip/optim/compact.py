"""AdamW in eight bytes a parameter: weight, gradient and both statistics in bfloat16.

The memory recipe of the CLIP paper (section 2.5: half-precision Adam statistics, half-precision
stochastically rounded weights) with bfloat16 for its fp16, since it needs no scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.ops.compact_adamw import compact_adamw
from fastclip.ops.dispatch import Impl

STORED = torch.bfloat16


def store_compactly(model: nn.Module) -> None:
    """Keep the trained matrices of `model` in bfloat16, rounded to nearest, in place.

    Gains, biases, logit parameters and positional embeddings stay fp32: they are few, and what they
    are added to shall be so too. To be called before the optimiser is made.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and _is_matrix(name, parameter):
            parameter.data = parameter.data.to(STORED)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith("positional_embedding")


class CompactAdamW(torch.optim.Optimizer):
    """AdamW whose statistics have the dtype of their parameter.

    What is kept in bfloat16 is rounded stochastically, by a function of the number of the update
    and the element: the same on every rank and after resuming. Nothing waits for the device;
    `grad_scale` and `found_inf` are obeyed as by torch's fused optimisers.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        impl: Impl = "auto",
    ) -> None:
        self.impl = impl
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                if not parameter.is_contiguous():
                    raise ValueError("weights in another memory format than contiguous")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seed = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                seed += 1
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, seed)
        return loss

    def _update(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], seed: int
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        count = state["step"]
        divisor = torch.ones_like(count) if self.grad_scale is None else self.grad_scale
        skip = torch.zeros_like(count) if self.found_inf is None else self.found_inf
        compact_adamw(
            parameter,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            count + 1,
            divisor,
            skip,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            seed * 0x9E3779B1 % 2**31,
            self.impl,
        )
        count.add_(1 - skip)
