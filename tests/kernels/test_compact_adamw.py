"""The kernel of the compact optimiser: interpreted, compiled for GPUs that are not here, run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.kernels import reference_optim

SCALARS = (
    "learning_rate", "rest1", "rest2", "log2_beta1", "log2_beta2", "eps", "weight_decay",
)  # fmt: skip
TYPES: dict[str, str] = (
    {"table": "*i64", "owners": "*i32", "divisor": "*fp32", "skip": "*fp32"}
    | dict.fromkeys(SCALARS, "fp32")
)  # fmt: skip
SETTINGS = (0.05, 0.9, 0.98, 1e-6, 0.2)
compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton's interpreter is on; it has no compiler",
)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
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
    return json.loads(run.stdout)


def test_interpreted_it_is_the_reference(report):
    assert report["operators"]
    whole, compact = (report["beside_reference"][f"torch.{d}"] for d in ("float32", "bfloat16"))
    assert whole["damaged"] == compact["damaged"] == 0
    assert whole["statistics"] == compact["statistics"] == 0
    # NumPy's exp2 and PyTorch's on a CPU differ in the last bit, of which 1 - 0.98 makes 50; and
    # PyTorch's root on a CPU is not always the nearest number.
    assert whole["furthest"] < 4e-6
    assert compact["furthest"] < 2**-7  # the neighbour, where fp32 was another in its last bit
    assert compact["different"] < 1e-3


def test_interpreted_rounding_keeps_nans_and_infinities(report):
    assert report["rounding"] == {"nan": True, "infinite": True, "equal": True}
    assert report["unfinite"]


def test_a_table_is_made_anew_when_a_tensor_has_moved(report):
    assert all(report["tables"].values()), report["tables"]


def test_tensors_that_do_not_belong_together_are_refused(report):
    assert [text.split()[-1] for text in report["refusals"]] == [
        "parameter", "parameter", "contiguous", "elements", "seed",
    ]  # fmt: skip


def _constants(rounds: bool, aligned: bool) -> dict[str, Any]:
    from fastclip.kernels.compact_adamw import BLOCK, COLUMNS

    return {"COLUMNS": COLUMNS, "BLOCK": BLOCK, "ROUND": rounds, "ALIGNED": aligned}


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("rounds", [True, False])
def test_it_compiles_without_spills(rounds, aligned, capability):
    pytest.importorskip("triton", reason="Triton is not installed")
    from compile_only import SHARED_LIMIT, compile_kernel
    from fastclip.kernels.compact_adamw import WARPS, compact_adamw_kernel

    needs = compile_kernel(
        compact_adamw_kernel,
        TYPES,
        _constants(rounds, aligned),
        capability,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    print(f"sm_{capability} bfloat16 {rounds}, aligned {aligned}: {needs}")
    assert needs.spilled == 0
    assert needs.shared <= SHARED_LIMIT[capability]
    # Or fewer than half of the threads that fit would run. Of tensors at odd places, which are few,
    # three in eight are enough.
    assert needs.registers <= (64 if aligned else 80)


@compiled
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("rounds", [True, False])
def test_its_operations_are_the_references(rounds, aligned):
    """What a GPU rounds as PyTorch does there, to the nearest number and after each operation.

    The powers alone are not exact: both sides take the same instruction, on numbers between -126
    and 0; those below it are nothing beside 1.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastclip.kernels.compact_adamw import WARPS, compact_adamw_kernel

    names = list(compact_adamw_kernel.arg_names)
    source = ASTSource(
        fn=compact_adamw_kernel,
        signature={name: TYPES.get(name, "constexpr") for name in names},
        constexprs={(names.index(k),): v for k, v in _constants(rounds, aligned).items()},
    )
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    operations = set(re.findall(r"\b(?:add|sub|mul|fma|div|sqrt|rcp|rsqrt|ex2)\.[a-z.]*f32\b", ptx))
    assert operations == {
        "add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32", "ex2.approx.ftz.f32",
    }  # fmt: skip
    # Sixteen bytes at once, of eight elements a thread: four tensors read and three written.
    vectors = [len(re.findall(rf"{kind}\.global\.v4\.b32", ptx)) for kind in ("ld", "st")]
    expected = [4, 3] if rounds else [8, 6]
    assert vectors == (expected if aligned else [0, 0])


def _on_gpu(count: int, dtype: torch.dtype, offset: int) -> list[torch.Tensor]:
    """Parameter, gradient and statistics, at `offset` elements from an aligned place."""
    torch.manual_seed(count)
    values = (
        torch.randn(count, device="cuda"),
        torch.randn(count, device="cuda"),
        torch.randn(count, device="cuda") * 0.1,
        torch.rand(count, device="cuda") * 0.01,
    )
    return [
        torch.cat([torch.zeros(offset, device="cuda"), value]).to(dtype)[offset:]
        for value in values
    ]


def _group_on_gpu() -> list[list[Any]]:
    counts = (0, 1, 1023, 1024, 1025, 3_000_000, 3_000_001)
    kinds = [
        (count, dtype, offset)
        for count in counts
        for dtype in (torch.float32, torch.bfloat16)
        for offset in (0, 1)
    ]
    places = [list(x) for x in zip(*(_on_gpu(*kind) for kind in kinds), strict=True)]
    steps = [torch.tensor(float(n * n + 1), device="cuda") for n in range(len(kinds))]
    return [*places, steps, list(range(100, 100 + len(kinds)))]


def _numbers_on_gpu(divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(divisor, device="cuda"), torch.zeros((), device="cuda")


def _kernels() -> Any:
    from fastclip.kernels import compact_adamw

    return compact_adamw


@pytest.mark.gpu
@pytest.mark.parametrize("divisor", [1.0, 4.0, 1.37])
def test_on_a_gpu_it_is_the_reference(divisor):
    """To the bit: every operation is, as its compiled form shows."""
    kernels = _kernels()
    results = []
    for module in (kernels, reference_optim, kernels):
        group = _group_on_gpu()
        module.compact_adamw_group(*group, *_numbers_on_gpu(divisor), *SETTINGS)
        results.append([x for place in (0, 2, 3) for x in group[place]])
    for mine, expected, again in zip(*results, strict=True):
        assert torch.equal(mine, again)
        assert torch.equal(mine, expected)


@pytest.mark.gpu
def test_on_a_gpu_a_nan_stays_one():
    kernels = _kernels()
    found = []
    for module in (kernels, reference_optim):
        group = [[x] for x in _on_gpu(64, torch.bfloat16, 0)]
        gradient, first_moment = group[1][0], group[2][0]
        gradient[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf], device="cuda")
        gradient[3], first_moment[3] = torch.inf, -torch.inf
        step = torch.ones((), device="cuda")
        module.compact_adamw_group(*group, [step], [1], *_numbers_on_gpu(1.0), *SETTINGS)
        found.append([group[place][0] for place in (0, 2, 3)])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)
    assert found[0][0][:4].isnan().all()
    assert found[0][0][4:].isfinite().all()


@pytest.mark.gpu
def test_in_a_cuda_graph_it_is_replayed():
    kernels = _kernels()
    eager, recorded = _group_on_gpu(), _group_on_gpu()
    numbers = _numbers_on_gpu(1.0)
    for _ in range(3):
        kernels.compact_adamw_group(*eager, *numbers, *SETTINGS)
    kernels.compact_adamw_group(*recorded, *numbers, *SETTINGS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.compact_adamw_group(*recorded, *numbers, *SETTINGS)
    for _ in range(2):
        graph.replay()
    for place in (0, 2, 3):
        for mine, expected in zip(recorded[place], eager[place], strict=True):
            assert torch.equal(mine, expected)
