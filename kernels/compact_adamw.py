"""AdamW on weights and statistics kept in bfloat16, in Triton; `reference_optim` says what it is.

Bound by memory: 14 bytes an element in bfloat16 (four read, three written), and the random numbers
are made in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a program."""

WARPS = 4


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, bits):
    pattern = x.to(tl.uint32, bitcast=True)
    pattern = (pattern + (bits & 0xFFFF)) & 0xFFFF0000
    # The low half is zero now, so that this cast has nothing left to round.
    return pattern.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=["seed"])
def compact_adamw_kernel(
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    step,
    divisor,
    skip,
    learning_rate,
    beta1,
    beta2,
    log2_beta1,
    log2_beta2,
    eps,
    weight_decay,
    seed,
    count,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One update of BLOCK elements."""
    if tl.load(skip) != 0.0:
        return
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    number = tl.load(step)
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) / tl.load(divisor)
    m = tl.load(exp_avg + place, mask=inside, other=0.0).to(tl.float32)
    m += (1.0 - beta1) * (g - m)
    v = tl.load(exp_avg_sq + place, mask=inside, other=0.0).to(tl.float32)
    v += (1.0 - beta2) * (g * g - v)
    correction1 = 1.0 - tl.exp2(number * log2_beta1)
    correction2 = 1.0 - tl.exp2(number * log2_beta2)
    p = tl.load(parameter + place, mask=inside, other=0.0).to(tl.float32)
    denominator = tl.sqrt(v / correction2) + eps
    p -= learning_rate * (weight_decay * p + (m / correction1) / denominator)
    if ROUND:
        key = _mix(_mix(number.to(tl.uint32)) + seed.to(tl.uint32))
        first = _mix(_mix(place.to(tl.uint32)) ^ key)
        second = _mix(first + 0x9E3779B9)
        tl.store(parameter + place, _rounded(p, first), mask=inside)
        tl.store(exp_avg + place, _rounded(m, first >> 16), mask=inside)
        tl.store(exp_avg_sq + place, _rounded(v, second), mask=inside)
    else:
        tl.store(parameter + place, p, mask=inside)
        tl.store(exp_avg + place, m, mask=inside)
        tl.store(exp_avg_sq + place, v, mask=inside)


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
    """`reference_optim.compact_adamw`; less than 2^32 elements."""
    count = parameter.numel()
    compact_adamw_kernel[(triton.cdiv(count, BLOCK),)](
        parameter,
        gradient,
        exp_avg,
        exp_avg_sq,
        step,
        divisor,
        skip,
        learning_rate,
        beta1,
        beta2,
        _log2(beta1),
        _log2(beta2),
        eps,
        weight_decay,
        seed,
        count,
        BLOCK=BLOCK,
        ROUND=parameter.dtype == torch.bfloat16,
        num_warps=WARPS,
    )


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf
