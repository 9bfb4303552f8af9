"""What our optimisers have in common: Adam's state, and a word on the device on what to do."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Due(NamedTuple):
    """A parameter that has a gradient."""

    number: int
    """Which of the optimiser's it is, from 1."""

    parameter: Tensor
    state: dict[str, Tensor]


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
        numbers = itertools.count(1)
        due = [
            [
                Due(number, parameter, self._state_of(parameter))
                for parameter, number in zip(group["params"], numbers, strict=False)
                if parameter.grad is not None
            ]
            for group in self.param_groups
        ]
        counts = [x.state["step"] for some in due for x in some]
        if not counts:
            return loss
        one = torch.ones((), device=counts[0].device)
        skip = torch.zeros_like(one) if self.found_inf is None else self.found_inf
        divisor = one if self.grad_scale is None else self.grad_scale
        verdict = Verdict(divisor, skip, one - skip)
        # In one launch, by a list: one tensor to be added to all would be read by the host.
        torch._foreach_add_(counts, [verdict.good] * len(counts))  # pyright: ignore[reportPrivateImportUsage]
        for group, some in zip(self.param_groups, due, strict=True):
            if some:
                self._update(group, some, verdict)
        return loss

    @abc.abstractmethod
    def _update(self, group: dict[str, Any], due: list[Due], verdict: Verdict) -> None:
        """Change parameters, ``exp_avg`` and ``exp_avg_sq``; ``step`` is that of this update, or,
        where nothing is to change, of the one before."""

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
