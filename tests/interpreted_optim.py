"""Runs the optimisers' kernels in Triton's interpreter, on a CPU, and prints what they do as JSON.

A program of its own, as `interpreted.py` is and for its reasons:
``TRITON_INTERPRET=1 python tests/interpreted_optim.py``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels import compact_adamw as kernels
from fastclip.kernels import reference_optim
from fastclip.ops.compact_adamw import compact_adamw_group

warnings.filterwarnings("ignore", category=RuntimeWarning)

SIZES = (0, 1, 7, 1023, 1024, 1025, 2048, 3000)
OFFSETS = (32, 33, 35, 40)
"""Elements between the start of the memory, which is aligned, and that of a tensor."""

SETTINGS = (0.05, 0.9, 0.98, 1e-6, 0.2)
VARIED = ((1.0, 0.0, 0.9), (256.0, 0.0, 0.0), (3.0, 0.0, 0.9), (1.0, 1.0, 0.9))
"""Divisor, skip and beta1."""

PLACES = ("parameter", "gradient", "exp_avg", "exp_avg_sq")
MODULES: tuple[Any, ...] = (kernels, reference_optim)


def _memory(count: int, dtype: torch.dtype, offset: int, number: int) -> list[Tensor]:
    """Of weight, gradient, both statistics: poisoned around them, which must stay as it is."""
    torch.manual_seed(number)
    values = (
        torch.randn(count),
        torch.randn(count) * torch.logspace(-3, 2, count),
        torch.randn(count) * 0.1,
        torch.rand(count) * 0.01,
    )
    made = []
    for value in values:
        memory = torch.full((count + 80,), torch.nan, dtype=dtype)
        memory[offset : offset + count] = value.to(dtype)
        made.append(memory)
    return made


def _group(kinds: list[tuple[int, torch.dtype, int]]) -> tuple[list[list[Tensor]], list[Any]]:
    """Memory of each tensor, and the operator's first six arguments, which are views of it."""
    memory = [_memory(*kind, number) for number, kind in enumerate(kinds)]
    views = [
        [
            four[place][offset : offset + count]
            for four, (count, _, offset) in zip(memory, kinds, strict=True)
        ]
        for place in range(4)
    ]
    steps = [torch.tensor(1.0 + number % 9) for number in range(len(kinds))]
    return memory, [*views, steps, [12345 + 7 * number for number in range(len(kinds))]]


def beside_reference() -> dict[str, dict[str, float]]:
    """A group of 128 tensors of all sizes, dtypes and alignments, with several settings.

    Returns by dtype: how many statistics differ, the share of other parameters, the furthest of
    them relative to old and new, and the damage around tensors and to what is only read.
    """
    dtypes = (torch.float32, torch.bfloat16)
    kinds = 2 * [(n, dtype, at) for n in SIZES for dtype in dtypes for at in OFFSETS]
    report = {
        str(dtype): {"statistics": 0, "different": 0.0, "furthest": 0.0, "damaged": 0}
        for dtype in dtypes
    }
    elements = dict.fromkeys(dtypes, 0)
    for divisor, skip, beta1 in VARIED:
        both = []
        for module in MODULES:
            memory, lists = _group(kinds)
            before = [[m.clone() for m in four] for four in memory]
            module.compact_adamw_group(
                *lists, torch.tensor(divisor), torch.tensor(skip), 0.05, beta1, 0.98, 1e-6, 0.2
            )
            both.append(memory)
        for (count, dtype, offset), mine, other, old in zip(kinds, *both, before, strict=True):  # pyright: ignore[reportPossiblyUnboundVariable]
            found = report[str(dtype)]
            inside = slice(offset, offset + count)
            for name, a, b in zip(PLACES, mine, old, strict=True):
                if skip or name == "gradient":
                    found["damaged"] += not torch.equal(a.nan_to_num(), b.nan_to_num())
                found["damaged"] += not (
                    a[:offset].isnan().all() and a[inside.stop :].isnan().all()
                )
                assert a[inside].isfinite().all()
            for place in (2, 3):
                found["statistics"] += int((mine[place][inside] != other[place][inside]).sum())
            new, expected, start = (x[0][inside].float() for x in (mine, other, old))
            distance = (new - expected).abs()
            elements[dtype] += count
            found["different"] += int((distance > 0).sum())
            if count:
                furthest = float((distance / (start.abs() + expected.abs())).max())
                found["furthest"] = max(found["furthest"], furthest)
    for dtype in dtypes:
        report[str(dtype)]["different"] /= elements[dtype]
    return report


@triton.jit
def _round_kernel(x, bits, result, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(result + place, kernels._rounded(tl.load(x + place), tl.load(bits + place)))


PATTERNS = (
    0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF, 0xFFC00000, 0x7F800001, 0x7F800000, 0xFF800000,
    0x7F7FFFFF, 0x00000000, 0x80000000, 0x00000001, 0x3F800000, 0x3F80FFFF, 0xBF808000, 0x00800000,
    0x42F6E979,
)  # fmt: skip


def rounding() -> dict[str, bool]:
    """NaNs of a GPU and of a CPU, infinities and all else, with the smallest and largest bits."""
    patterns = torch.tensor(PATTERNS, dtype=torch.int64).to(torch.int32)
    found = {"nan": True, "infinite": True, "equal": True}
    for drawn in (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x12345678):
        x, bits = patterns.view(torch.float32), torch.full_like(patterns, drawn)
        result = torch.empty(len(PATTERNS), dtype=torch.bfloat16)
        _round_kernel[(1,)](x, bits, result, BLOCK=len(PATTERNS))  # pyright: ignore[reportArgumentType]
        expected = reference_optim.round_stochastically(x, bits)
        found["nan"] &= torch.equal(result.isnan(), x.isnan())
        found["infinite"] &= torch.equal(result[x.isinf()].float(), x[x.isinf()])
        same = result.view(torch.int16) == expected.view(torch.int16)
        found["equal"] &= bool((same | x.isnan()).all())
    return found


def unfinite() -> bool:
    """Whether gradients that are not finite come out as the reference's do."""
    both = []
    for module in MODULES:
        _, lists = _group([(64, torch.bfloat16, 32), (64, torch.float32, 32)])
        for gradient, first_moment in zip(lists[1], lists[2], strict=True):
            gradient[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
            gradient[3], first_moment[3] = torch.inf, -torch.inf
        module.compact_adamw_group(*lists, torch.tensor(1.0), torch.tensor(0.0), *SETTINGS)
        both.append([x for some in lists[:4] for x in some])
    assert all(x[:4].isnan().all() for x in both[0][:2])
    return all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(*both, strict=True))


def tables() -> dict[str, bool]:
    """When the table of a group is made anew, and what CUDA graphs are told."""
    numbers = (torch.tensor(1.0), torch.tensor(0.0), *SETTINGS)
    held = []  # or the next gradients could be where the last were

    def moved_gradients() -> list[Tensor]:
        held.append([torch.randn_like(x) for x in lists[1]])
        return held[-1]

    kinds = [
        (3000, torch.bfloat16, 32),  # no multiple of 16
        (3008, torch.bfloat16, 32),
        (64, torch.float32, 32),
        (64, torch.float32, 33),
        (0, torch.float32, 32),
    ]
    _, lists = _group(kinds)
    first = kernels._plan(tuple(lists[:4]), *lists[4:])
    again = kernels._plan(tuple(lists[:4]), *lists[4:])
    shapes = {launch[:2]: (len(launch.table), len(launch.owners)) for launch in first}
    expected_shapes = {
        (True, False): (1, 3), (True, True): (1, 3), (False, True): (1, 1), (False, False): (1, 1),
    }  # fmt: skip
    found = {"kept": again is first, "launches": shapes == expected_shapes}

    kept = lists[1]
    lists[1] = moved_gradients()
    moved = kernels._plan(tuple(lists[:4]), *lists[4:])
    by_kind = {launch[:2]: launch for launch in moved}
    found["follows"] = all(
        not torch.equal(a.table, by_kind[a[:2]].table) and a.owners is by_kind[a[:2]].owners
        for a in first
    )
    expected = [[x.clone() for x in some] for some in lists[:4]]
    MODULES[0].compact_adamw_group(*lists, *numbers)
    MODULES[1].compact_adamw_group(*expected, *lists[4:], *numbers)
    found["right"] = all(
        torch.equal(a, b) for k in (2, 3) for a, b in zip(lists[k], expected[k], strict=True)
    )

    kernels._recording = lambda device: True
    lists[1] = kept
    found["recorded"] = kernels._plan(tuple(lists[:4]), *lists[4:]) is first
    lists[1] = moved_gradients()
    try:
        kernels._plan(tuple(lists[:4]), *lists[4:])
        found["refused"] = False
    except RuntimeError as error:
        found["refused"] = "make one before" in str(error)
    kernels._recording = lambda device: False
    for _ in range(kernels.KEPT_PLANS + 5):
        lists[1] = moved_gradients()
        kernels._plan(tuple(lists[:4]), *lists[4:])
    newest = kernels._plan(tuple(lists[:4]), *lists[4:])
    found["newest stays"] = kernels._plan(tuple(lists[:4]), *lists[4:]) is newest
    found["bounded"] = len(kernels._plans) == kernels.KEPT_PLANS
    found["recordings stay"] = kernels._recorded == [first]
    return found


def refusals() -> list[str]:
    """What is said of tensors that do not belong together."""
    said = []
    for change in ("size", "dtype", "strides", "half", "number"):
        _, lists = _group([(64, torch.float32, 32), (64, torch.bfloat16, 32)])
        if change == "size":
            lists[1][0] = torch.zeros(63)
        elif change == "dtype":
            lists[2][1] = torch.zeros(64)
        elif change == "strides":
            lists[3][0] = torch.zeros(128)[::2]
        elif change == "half":
            lists[:4] = [[x.half() for x in some] for some in lists[:4]]
        else:
            lists[3].pop()
        try:
            MODULES[0].compact_adamw_group(*lists, torch.tensor(1.0), torch.tensor(0.0), *SETTINGS)
        except ValueError as error:
            said.append(str(error))
    return said


def operators() -> bool:
    """torch.library's checks of the operators with this implementation."""
    numbers = (torch.tensor(1.0), torch.tensor(0.0), *SETTINGS)
    _, lists = _group([(15, torch.float32, 32), (64, torch.bfloat16, 32), (0, torch.float32, 32)])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(compact_adamw_group, (*lists, *numbers, "triton"), test_utils=checks)
    compact_adamw_group([], [], [], [], [], [], *numbers, "triton")
    return True


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "beside_reference": beside_reference(),
                "rounding": rounding(),
                "unfinite": unfinite(),
                "tables": tables(),
                "refusals": refusals(),
                "operators": operators(),
            }
        )
    )
