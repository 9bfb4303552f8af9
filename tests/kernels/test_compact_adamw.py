"""The kernel of the compact optimiser: interpreted, compiled for GPUs that are not here, run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastclip.kernels import reference_optim

TYPES: dict[str, str] = (
    dict.fromkeys(("step", "divisor", "skip"), "*fp32")
    | dict.fromkeys(
        ("learning_rate", "beta1", "beta2", "log2_beta1", "log2_beta2", "eps", "weight_decay"),
        "fp32",
    )
    | {"seed": "i32", "count": "i32"}
)
TENSORS = ("parameter", "gradient", "exp_avg", "exp_avg_sq")
SCALARS = (0.05, 0.9, 0.98, 1e-6, 0.2, 12345)


def test_interpreted_it_is_the_reference():
    pytest.importorskip("triton", reason="Triton is not installed")
    program = Path(__file__).parents[1] / "interpreted_optim.py"
    run = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["operator"]
    whole, compact = (report["beside_reference"][f"torch.{d}"] for d in ("float32", "bfloat16"))
    assert whole["damaged"] == compact["damaged"] == 0
    assert whole["furthest"] < 1e-6
    assert compact["furthest"] < 2**-7  # the neighbour, where fp32 was another in its last bit
    assert compact["different"] < 1e-3


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton's interpreter is on; it has no compiler",
)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
def test_it_compiles_without_spills(dtype, capability):
    pytest.importorskip("triton", reason="Triton is not installed")
    from compile_only import SHARED_LIMIT, compile_kernel
    from fastclip.kernels.compact_adamw import BLOCK, WARPS, compact_adamw_kernel

    needs = compile_kernel(
        compact_adamw_kernel,
        TYPES | dict.fromkeys(TENSORS, str(dtype)),
        {"BLOCK": BLOCK, "ROUND": dtype == "*bf16"},
        capability,
        num_warps=WARPS,
    )
    print(f"sm_{capability} {dtype}: {needs}")
    assert needs.spilled == 0
    assert needs.shared <= SHARED_LIMIT[capability]
    assert needs.registers <= 64  # or fewer than half of the threads that fit would run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_it_is_the_reference(dtype):
    from fastclip.kernels import compact_adamw as kernels

    for count in (1, 1023, 1025, 3_000_000):
        torch.manual_seed(count)
        start = [
            torch.randn(count, device="cuda").to(dtype),
            torch.randn(count, device="cuda").to(dtype),
            (torch.randn(count, device="cuda") * 0.1).to(dtype),
            (torch.rand(count, device="cuda") * 0.01).to(dtype),
        ]
        numbers = [torch.tensor(x, device="cuda") for x in (7.0, 4.0, 0.0)]
        results = []
        for module in (kernels, reference_optim, kernels):
            tensors = [x.clone() for x in start]
            module.compact_adamw(*tensors, *numbers, *SCALARS)
            results.append(tensors)
        for mine, expected, again in zip(*results, strict=True):
            assert torch.equal(mine, again)
            distance = (mine.float() - expected.float()).abs()
            relative = distance / expected.float().abs().clamp(min=1e-6)
            assert float(relative.max()) < (2**-7 if dtype == torch.bfloat16 else 1e-5)
            assert float((distance > 0).float().mean()) < (1e-2 if dtype == torch.bfloat16 else 1)
