"""The update of weights kept in bfloat16 as an operator; meaning and arguments: the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.ops.dispatch import optim_module


@torch.library.custom_op(
    "fastclip::compact_adamw_group", mutates_args=("parameters", "exp_avgs", "exp_avg_sqs")
)
def compact_adamw_group(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    seeds: list[int],
    divisor: Tensor,
    skip: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    impl: str,
) -> None:
    """One AdamW update of many tensors in place; it has no gradient.

    Meaning and arguments are those of `reference_optim.compact_adamw_group`.
    """
    if not parameters:
        return
    with torch.cuda.device_of(parameters[0]):
        optim_module(impl, parameters[0]).compact_adamw_group(
            parameters,
            [gradient.contiguous() for gradient in gradients],
            exp_avgs,
            exp_avg_sqs,
            steps,
            seeds,
            divisor,
            skip,
            learning_rate,
            beta1,
            beta2,
            eps,
            weight_decay,
        )


@compact_adamw_group.register_fake
def _(
    parameters, gradients, exp_avgs, exp_avg_sqs, steps, seeds, divisor, skip, learning_rate, beta1,
    beta2, eps, weight_decay, impl,
):  # fmt: skip
    del parameters, gradients, exp_avgs, exp_avg_sqs, steps, seeds, divisor, skip, learning_rate
    del beta1, beta2, eps, weight_decay, impl
