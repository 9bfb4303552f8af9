"""Updates of weights kept in bfloat16, in plain PyTorch: specification, CPU path, test oracle.

A bfloat16 weight has 8 bits of mantissa: an update smaller than 1/512 of a weight, as most are late
in training, would be lost in rounding to nearest. Rounded stochastically it is made with as much
probability as it is large, so that updates add up in the mean (the CLIP paper's section 2.5 names
this saving; arXiv 2010.06192 studies it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (int32, as unsigned ones) whose results look random.

    The constants are C. Wellons' lowbias32 (public domain, nullprogram.com/blog/2018/07/31).
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(count: int, seed: int, step: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit numbers (int32 [count]) for each element of a tensor in one update.

    Args:
        seed: in [0, 2^31), another for each tensor.
        step: [], the number of the update.
    """
    elements = torch.arange(count, dtype=torch.int32, device=step.device)
    key = mix(mix(step.to(torch.int32)) + seed)
    first = mix(mix(elements) ^ key)
    return first, mix(first + (0x9E3779B9 - 2**32))


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 `x` to bfloat16: to either neighbour, the nearer the likelier; NaN and infinities stay.

    Args:
        bits: int32, like `x`; the low 16 bits of each are used.
    """
    rounded = (x.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    # Beyond a GPU's NaN, 0x7FFFFFFF, lies -0.
    return torch.where(x.isnan(), x, rounded.view(torch.float32)).bfloat16()


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
) -> None:
    """One AdamW update in place, computed in fp32; what is kept in bfloat16 is rounded as above.

    Args:
        parameter: fp32 or bfloat16, contiguous.
        gradient, exp_avg, exp_avg_sq: like it.
        step: fp32 [], the number of this update, from 1.
        divisor: fp32 []; the gradient is divided by it.
        skip: fp32 []; where it is not 0, nothing changes.
        seed: of this tensor's rounding, in [0, 2^31).
    """
    g = gradient.float() / divisor
    m = exp_avg.float()
    m = m + (1.0 - beta1) * (g - m)
    v = exp_avg_sq.float()
    v = v + (1.0 - beta2) * (g * g - v)
    # Powers as the kernel has them: exp2(step * log2(beta)).
    correction1 = 1.0 - torch.exp2(step * math.log2(beta1)) if beta1 else torch.ones_like(step)
    correction2 = 1.0 - torch.exp2(step * math.log2(beta2)) if beta2 else torch.ones_like(step)
    p = parameter.float()
    denominator = torch.sqrt(v / correction2) + eps
    p = p - learning_rate * (weight_decay * p + (m / correction1) / denominator)
    new = (p, m, v)
    if parameter.dtype == torch.bfloat16:
        first, second = (
            bits.view(parameter.shape) for bits in random_bits(parameter.numel(), seed, step)
        )
        shared = zip(new, (first, first >> 16, second), strict=True)
        new = tuple(round_stochastically(x, bits) for x, bits in shared)
    keep = skip != 0
    for old, updated in zip((parameter, exp_avg, exp_avg_sq), new, strict=True):
        old.copy_(torch.where(keep, old, updated.to(old.dtype)))


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
) -> None:
    """`compact_adamw` of many tensors, of either dtype, whose settings are the same."""
    settings = (divisor, skip, learning_rate, beta1, beta2, eps, weight_decay)
    lists = (parameters, gradients, exp_avgs, exp_avg_sqs, steps, seeds)
    for p, g, m, v, step, seed in zip(*lists, strict=True):
        compact_adamw(p, g, m, v, step, *settings, seed)
