"""LAMB (arXiv 1904.00962): Adam's step of a weight, as long as the weight allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """LAMB with bias correction and decoupled decay.

    Groups without decay (gains, biases, temperature) take Adam's step as it is. Nothing waits for
    the device; `grad_scale` and `found_inf` are obeyed as by torch's fused optimisers. The norms
    are of whole parameters, which must therefore not be sharded.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        step, exp_avg, exp_avg_sq = state["step"], state["exp_avg"], state["exp_avg_sq"]
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        good = torch.ones_like(step) if self.found_inf is None else 1 - self.found_inf
        # A bad gradient becomes zero, and what would move is multiplied by zero.
        clean = torch.where(good > 0, gradient, 0.0)
        if self.grad_scale is not None:
            clean = clean / self.grad_scale
        step += good
        count = step.clamp(min=1.0)
        exp_avg.lerp_(clean, (1 - beta1) * good)
        exp_avg_sq.lerp_(clean.square(), (1 - beta2) * good)
        first = exp_avg / (1 - beta1**count)
        second = exp_avg_sq / (1 - beta2**count)
        update = first / (second.sqrt() + group["eps"])
        length = good * group["lr"]
        if decay:
            update += decay * parameter
            ratio = parameter.norm() / update.norm()
            # Where a norm is zero there is no ratio, and Adam's step is taken.
            length = length * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        parameter.sub_(length * update)
