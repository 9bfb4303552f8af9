"""The update of weights kept in bfloat16 as an operator; meaning and arguments: the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.ops.dispatch import optim_module


@torch.library.custom_op(
    "fastclip::compact_adamw", mutates_args=("parameter", "exp_avg", "exp_avg_sq")
)
def compact_adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    divisor: Tensor,
    skip: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
    impl: str,
) -> None:
    """One AdamW update in place; it has no gradient."""
    with torch.cuda.device_of(parameter):
        optim_module(impl, parameter).compact_adamw(
            parameter,
            gradient.contiguous(),
            exp_avg,
            exp_avg_sq,
            step,
            divisor,
            skip,
            learning_rate,
            beta1,
            beta2,
            eps,
            weight_decay,
            seed,
        )


@compact_adamw.register_fake
def _(
    parameter, gradient, exp_avg, exp_avg_sq, step, divisor, skip, learning_rate, beta1, beta2, eps,
    weight_decay, seed, impl,
):  # fmt: skip
    del parameter, gradient, exp_avg, exp_avg_sq, step, divisor, skip, learning_rate, beta1, beta2
    del eps, weight_decay, seed, impl
