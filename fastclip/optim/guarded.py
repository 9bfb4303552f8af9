"""What our optimisers have in common: Adam's state, and a word on the device on what to do."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What the engine has decided of an update; fp32 tensors of shape [], on the device."""

    divisor: Tensor
    """Gradients are divided by it."""

    skip: Tensor
    """Where it is not 0, nothing is to change."""

    good: Tensor
    """1 - skip."""


class GuardedOptimizer(torch.optim.Optimizer, abc.ABC):
    """An optimiser with Adam's statistics, in the dtype of their parameter.

    Attributes:
        grad_scale, found_inf: as torch's fused optimisers have them, None for 1 and 0. Nothing
            waits for the device.
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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = [(group, p) for group in self.param_groups for p in group["params"]]
        used = [(n, group, p) for n, (group, p) in enumerate(places, 1) if p.grad is not None]
        if not used:
            return loss
        counts = [self._state_of(parameter)["step"] for _, _, parameter in used]
        one = torch.ones((), device=counts[0].device)
        skip = torch.zeros_like(one) if self.found_inf is None else self.found_inf
        divisor = one if self.grad_scale is None else self.grad_scale
        verdict = Verdict(divisor, skip, one - skip)
        # All counts in two launches, not two for each.
        updates = torch._foreach_add(counts, 1.0)  # pyright: ignore[reportPrivateImportUsage]
        for (number, group, parameter), update in zip(used, updates, strict=True):
            self._update(parameter, self.state[parameter], update, group, verdict, number)
        # A list: what is to be added to all as one tensor would be read by the host.
        torch._foreach_add_(counts, [verdict.good] * len(counts))  # pyright: ignore[reportPrivateImportUsage]
        return loss

    @abc.abstractmethod
    def _update(
        self,
        parameter: Tensor,
        state: dict[str, Tensor],
        update: Tensor,
        group: dict[str, Any],
        verdict: Verdict,
        number: int,
    ) -> None:
        """Change `parameter`, ``exp_avg`` and ``exp_avg_sq``.

        Args:
            update: fp32 [], which update this is, from 1, not counting those that were skipped.
            number: which of the optimiser's parameters this is, from 1.
        """

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
