"""LAMB (arXiv 1904.00962): Adam's step of a weight, as long as the weight allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip.optim.guarded import Due, GuardedOptimizer, Verdict


class Lamb(GuardedOptimizer):
    """LAMB with bias correction and decoupled decay.

    Groups without decay (gains, biases, temperature) take Adam's step as it is. The norms are of
    whole parameters, which must therefore not be sharded.
    """

    def _update(self, group: dict[str, Any], due: list[Due], verdict: Verdict) -> None:
        # Which update this is, were it made: a count of 0 would divide by 0.
        counts = [x.state["step"] for x in due]
        updates = torch._foreach_add(counts, [verdict.skip] * len(due))  # pyright: ignore[reportPrivateImportUsage]
        for x, update in zip(due, updates, strict=True):
            self._update_one(x.parameter, x.state, update, group, verdict)

    def _update_one(
        self,
        parameter: Tensor,
        state: dict[str, Tensor],
        update: Tensor,
        group: dict[str, Any],
        verdict: Verdict,
    ) -> None:
        assert parameter.grad is not None
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        # A bad gradient becomes zero, and what would move is multiplied by zero.
        clean = torch.where(verdict.good > 0, parameter.grad, 0.0) / verdict.divisor
        exp_avg.lerp_(clean, (1 - beta1) * verdict.good)
        exp_avg_sq.lerp_(clean.square(), (1 - beta2) * verdict.good)
        first = exp_avg / (1 - beta1**update)
        second = exp_avg_sq / (1 - beta2**update)
        change = first / (second.sqrt() + group["eps"])
        length = verdict.good * group["lr"]
        if decay:
            change += decay * parameter
            ratio = parameter.norm() / change.norm()
            # Where a norm is zero there is no ratio, and Adam's step is taken.
            length = length * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        parameter.sub_(length * change)
