"""AdamW in eight bytes a parameter: weight, gradient and both statistics in bfloat16.

The memory recipe of the CLIP paper (section 2.5: half-precision Adam statistics, half-precision
stochastically rounded weights) with bfloat16 for its fp16, since it needs no scaling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastclip.ops.compact_adamw import compact_adamw_group
from fastclip.ops.dispatch import Impl
from fastclip.optim.guarded import Due, GuardedOptimizer, Verdict

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


class CompactAdamW(GuardedOptimizer):
    """AdamW whose statistics have the dtype of their parameter.

    What is kept in bfloat16 is rounded stochastically, by a function of the number of the update
    and the element: the same on every rank and after resuming.
    """

    def __init__(
        self, params: list[dict[str, Any]], *, impl: Impl = "auto", **settings: Any
    ) -> None:
        self.impl = impl
        super().__init__(params, **settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                if not parameter.is_contiguous():
                    raise ValueError("weights in another memory format than contiguous")

    def _update(self, group: dict[str, Any], due: list[Due], verdict: Verdict) -> None:
        compact_adamw_group(
            [x.parameter for x in due],
            [x.parameter.grad for x in due],
            [x.state["exp_avg"] for x in due],
            [x.state["exp_avg_sq"] for x in due],
            [x.state["step"] for x in due],
            [x.number * 0x9E3779B1 % 2**31 for x in due],
            verdict.divisor,
            verdict.skip,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            self.impl,
        )
