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

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from torch import Tensor

from fastclip.kernels import compact_adamw as kernels
from fastclip.kernels import reference_optim
from fastclip.ops.compact_adamw import compact_adamw

warnings.filterwarnings("ignore", category=RuntimeWarning)

SIZES = (1, 7, 1023, 1024, 1025, 3000)


def _tensors(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Weight, gradient, both statistics: views into poisoned memory, which must stay as it is."""
    torch.manual_seed(count)
    values = (
        torch.randn(count),
        torch.randn(count) * torch.logspace(-3, 2, count),
        torch.randn(count) * 0.1,
        torch.rand(count) * 0.01,
    )
    tensors = []
    for value in values:
        memory = torch.full((count + 64,), torch.nan, dtype=dtype)
        memory[32:-32] = value.to(dtype)
        tensors.append(memory)
    return tensors


def beside_reference() -> dict[str, dict[str, float]]:
    """Of all sizes, dtypes and settings: the share of other results, the furthest, the damage."""
    report = {}
    for dtype in (torch.float32, torch.bfloat16):
        different, elements, furthest, damaged = 0, 0, 0.0, 0
        for count in SIZES:
            for step, divisor, skip, beta1 in ((1.0, 1.0, 0.0, 0.9), (7.0, 256.0, 0.0, 0.0),
                                               (3.0, 1.0, 1.0, 0.9)):  # fmt: skip
                both = []
                for module in (kernels, reference_optim):
                    memory = _tensors(count, dtype)
                    before = [m.clone() for m in memory]
                    p, g, m, v = (x[32:-32] for x in memory)
                    module.compact_adamw(
                        p, g, m, v, torch.tensor(step), torch.tensor(divisor), torch.tensor(skip),
                        0.05, beta1, 0.98, 1e-6, 0.2, 12345,
                    )  # fmt: skip
                    if skip:
                        damaged += sum(
                            not torch.equal(a.nan_to_num(), b.nan_to_num())
                            for a, b in zip(memory, before, strict=True)
                        )
                    damaged += sum(not x[:32].isnan().all() for x in memory)
                    damaged += sum(not x[-32:].isnan().all() for x in memory)
                    damaged += not torch.equal(g, before[1][32:-32])
                    both.append([p.clone(), m.clone(), v.clone()])
                for mine, other in zip(*both, strict=True):
                    assert mine.isfinite().all()
                    elements += count
                    different += int((mine != other).sum())
                    distance = (mine.float() - other.float()).abs()
                    scale = other.float().abs().clamp(min=1e-6)
                    furthest = max(furthest, float((distance / scale).max()))
        report[str(dtype)] = {
            "different": different / elements,
            "furthest": furthest,
            "damaged": damaged,
        }
    return report


def operator() -> bool:
    """torch.library's checks of the operator with this implementation."""
    x = torch.randn(5, 3)
    arguments = (
        x, x * 0.1, torch.zeros_like(x), torch.zeros_like(x), torch.tensor(1.0), torch.tensor(1.0),
        torch.tensor(0.0), 0.1, 0.9, 0.98, 1e-6, 0.1, 5, "triton",
    )  # fmt: skip
    torch.library.opcheck(compact_adamw, arguments, test_utils=("test_schema", "test_faketensor"))
    return True


if __name__ == "__main__":
    print(json.dumps({"beside_reference": beside_reference(), "operator": operator()}))
