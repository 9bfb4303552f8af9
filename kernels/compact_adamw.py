"""AdamW on weights and statistics kept in bfloat16, in Triton; `reference_optim` says what it is.

Bound by memory: 14 bytes an element in bfloat16 (four read, three written), and the random numbers
are made in registers. One launch updates all tensors of a dtype, however many: a table on the
device says where they are, and is written anew only when one of them has moved.

Every operation is the reference's, rounded as IEEE 754 has it and never fused with the next, so
that on a GPU the results are the same to the bit.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a program."""

WARPS = 4

ALIGNMENT = 16
"""Bytes that a thread reads at once, where tensors begin and end at multiples of it."""

COLUMNS = 8
"""Of a table: where parameter, gradient, exp_avg, exp_avg_sq and step are, the number of elements,
the seed, and the first of the programs that update this tensor."""

KEPT_PLANS = 64
"""Gradients that are freed after each update come back at one of a few sets of places."""


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
    # Beyond a GPU's NaN, 0x7FFFFFFF, lies -0.
    pattern = tl.where(x == x, pattern + (bits & 0xFFFF), 0x7FC00000)
    return (pattern >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _pointer(row, column: tl.constexpr, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def compact_adamw_kernel(
    table,
    owners,
    divisor,
    skip,
    learning_rate,
    rest1,
    rest2,
    log2_beta1,
    log2_beta2,
    eps,
    weight_decay,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One update of BLOCK elements of the tensor in row owners[program] of the table.

    Args:
        rest1, rest2: 1 - beta, rounded once.
        ALIGNED: pointers and counts of all tensors are multiples of 16.
    """
    program = tl.program_id(0)
    row = table + tl.load(owners + program) * COLUMNS
    if tl.load(skip) != 0.0:
        return
    TYPE: tl.constexpr = tl.bfloat16 if ROUND else tl.float32
    start = (program - tl.load(row + 7)) * BLOCK
    parameter = _pointer(row, 0, start, TYPE, ALIGNED)
    gradient = _pointer(row, 1, start, TYPE, ALIGNED)
    exp_avg = _pointer(row, 2, start, TYPE, ALIGNED)
    exp_avg_sq = _pointer(row, 3, start, TYPE, ALIGNED)
    number = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)))
    left = tl.minimum(tl.load(row + 5) - start, BLOCK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    place = tl.arange(0, BLOCK)
    inside = place < left
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + place, mask=inside, other=0.0).to(tl.float32)
    # Most often the divisor is 1, and after the first updates the corrections are: an exact
    # division is some thirteen instructions, of a hundred in all.
    scale = tl.load(divisor)
    if scale != 1.0:
        g = tl.math.div_rn(g, scale)
    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    correction1 = 1.0 - tl.exp2(number * log2_beta1)
    correction2 = 1.0 - tl.exp2(number * log2_beta2)
    first_moment = m
    if correction1 != 1.0:
        first_moment = tl.math.div_rn(m, correction1)
    second_moment = v
    if correction2 != 1.0:
        second_moment = tl.math.div_rn(v, correction2)
    p = tl.load(parameter + place, mask=inside, other=0.0).to(tl.float32)
    change = tl.math.div_rn(first_moment, tl.sqrt_rn(second_moment) + eps)
    p -= learning_rate * (weight_decay * p + change)
    if ROUND:
        key = _mix(_mix(number.to(tl.uint32)) + tl.load(row + 6).to(tl.uint32))
        first = _mix(_mix(start.to(tl.uint32) + place.to(tl.uint32)) ^ key)
        second = _mix(first + 0x9E3779B9)
        tl.store(parameter + place, _rounded(p, first), mask=inside)
        tl.store(exp_avg + place, _rounded(m, first >> 16), mask=inside)
        tl.store(exp_avg_sq + place, _rounded(v, second), mask=inside)
    else:
        tl.store(parameter + place, p, mask=inside)
        tl.store(exp_avg + place, m, mask=inside)
        tl.store(exp_avg_sq + place, v, mask=inside)


class Launch(NamedTuple):
    """Tensors of one dtype, whose places and sizes are all aligned or not."""

    rounds: bool
    aligned: bool
    table: Tensor
    """int64 [tensors, COLUMNS]."""

    owners: Tensor
    """int32 [programs], the row of each."""


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
    """`reference_optim.compact_adamw_group`, on one device; less than 2^32 elements in each tensor.

    Raises:
        ValueError: tensors that belong together differ, are not contiguous or too large.
        RuntimeError: a CUDA graph is being recorded, and these tensors were not updated before.
    """
    for launch in _plan((parameters, gradients, exp_avgs, exp_avg_sqs), steps, seeds):
        compact_adamw_kernel[(len(launch.owners),)](
            launch.table,
            launch.owners,
            divisor,
            skip,
            learning_rate,
            1.0 - beta1,
            1.0 - beta2,
            _log2(beta1),
            _log2(beta2),
            eps,
            weight_decay,
            COLUMNS=COLUMNS,
            BLOCK=BLOCK,
            ROUND=launch.rounds,
            ALIGNED=launch.aligned,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf


Key = tuple[
    torch.device, tuple[int, ...], tuple[int, ...], tuple[torch.dtype, ...], tuple[int, ...]
]
"""Device; pointers of parameters, gradients, exp_avgs, exp_avg_sqs and steps; counts and dtypes of
the first four; seeds."""

_plans: OrderedDict[tuple[int, Key], list[Launch]] = OrderedDict()
"""By stream and key, the one that was used last at the end."""

_recorded: list[list[Launch]] = []
"""Of CUDA graphs, which read their tables at every replay."""


def _plan(lists: tuple[list[Tensor], ...], steps: list[Tensor], seeds: list[int]) -> list[Launch]:
    """The launches of an update, with tables that are already there if nothing has moved.

    Args:
        lists: parameters and what is like them.
    """
    if not steps:
        return []
    device = steps[0].device
    # All that a table is made of: what has one key has one table, whoever owns the memory.
    key = (
        device,
        tuple([x.data_ptr() for tensors in (*lists, steps) for x in tensors]),
        tuple([x.numel() for tensors in lists for x in tensors]),
        tuple([x.dtype for tensors in lists for x in tensors]),
        tuple(seeds),
    )
    if _recording(device):
        found = next((plan for (_, known), plan in _plans.items() if known == key), None)
        if found is None:
            raise RuntimeError(
                "a CUDA graph of compact_adamw is recorded after an update of the same tensors, "
                "gradients in the same memory included: make one before, and keep the gradients "
                "(zero_grad(set_to_none=False))"
            )
        _recorded.append(found)
        return found
    # A table is written on the stream that reads it, which therefore need not wait.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    plan = _plans.get((stream, key))
    if plan is None:
        plan = _plans[stream, key] = _tabulate(key, lists, stream)
        if len(_plans) > KEPT_PLANS:
            _plans.popitem(last=False)
    else:
        _plans.move_to_end((stream, key))
    return plan


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _tabulate(key: Key, lists: tuple[list[Tensor], ...], stream: int) -> list[Launch]:
    device, places, counts, dtypes, seeds = key
    tensors = len(seeds)
    _check(lists, counts, dtypes, tensors)
    rows: dict[tuple[bool, bool], list[list[int]]] = {}
    programs: dict[tuple[bool, bool], list[int]] = {}
    for number, (count, dtype, seed) in enumerate(
        zip(counts[:tensors], dtypes[:tensors], seeds, strict=True)
    ):
        if not count:
            continue
        *tensor, step = places[number::tensors]
        aligned = not any(x % ALIGNMENT for x in (*tensor, count))
        kind = (dtype == torch.bfloat16, aligned)
        table, sizes = rows.setdefault(kind, []), programs.setdefault(kind, [])
        first = table[-1][7] + sizes[-1] if table else 0
        table.append([*tensor, step, count, seed, first])
        sizes.append(-(-count // BLOCK))
    return [
        Launch(
            *kind,
            _upload(torch.tensor(table), device),
            _owners(tuple(programs[kind]), device, stream),
        )
        for kind, table in rows.items()
    ]


def _check(
    lists: tuple[list[Tensor], ...],
    counts: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    tensors: int,
) -> None:
    """That the kernel finds what it takes for granted."""
    if len(counts) != 4 * tensors:
        raise ValueError("each parameter has a gradient, two statistics, a step and a seed")
    if counts != counts[:tensors] * 4 or dtypes != dtypes[:tensors] * 4:
        raise ValueError("gradient and statistics have the size and dtype of their parameter")
    if not all(x.is_contiguous() for some in lists for x in some):
        raise ValueError("parameters, gradients and statistics are contiguous")
    if max(counts) >= 2**32 or set(dtypes) - {torch.bfloat16, torch.float32}:
        raise ValueError("parameters are fp32 or bfloat16, and have less than 2^32 elements")


@functools.lru_cache(maxsize=KEPT_PLANS)
def _owners(programs: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """The row of each program, which stays while tensors move."""
    del stream  # on which it is written, as a table is
    rows = torch.arange(len(programs), dtype=torch.int32)
    return _upload(rows.repeat_interleave(torch.tensor(programs)), device)


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """Without waiting; PyTorch keeps the pinned memory until the copy is made."""
    if device.type != "cuda":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)
