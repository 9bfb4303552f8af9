"""Every kernel compiles for sm_80, sm_90 and sm_100 without spills, within shared memory.

No GPU is needed: ``pytest tests/kernels/test_compile.py -s`` prints the table.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter is on; it has no compiler", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from compile_only import SHARED_LIMIT, compile_kernel
from fastclip.kernels.contrastive import gradient_kernel, statistics_kernel
from fastclip.kernels.sigmoid import sigmoid_kernel
from fastclip.kernels.tiling import tiling

DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
POINTERS_FP32 = (
    "scale",
    "bias",
    "own_logit",
    "positives",
    "row_largest",
    "row_sum",
    "column_largest",
    "column_sum",
    "gap_partial",
    "row_lse",
    "row_rest",
    "column_lse",
    "column_rest",
    "loss_partial",
    "scale_partial",
    "bias_partial",
)
SIZES = ("row_count", "column_count", "dims", "row_stride", "column_stride", "row_offset")

CASES = {
    "statistics": (statistics_kernel, {"HAS_IDS": False, "HAS_GAP": False}),
    "statistics, ids": (statistics_kernel, {"HAS_IDS": True, "HAS_GAP": True}),
    "gradient": (gradient_kernel, {"HAS_IDS": False, "HAS_TARGETS": False}),
    "gradient, ids": (gradient_kernel, {"HAS_IDS": True, "HAS_TARGETS": True}),
    "sigmoid loss": (sigmoid_kernel, {"HAS_IDS": False, "WITH_GRADIENT": False}),
    "sigmoid gradient": (sigmoid_kernel, {"HAS_IDS": False, "WITH_GRADIENT": True}),
    "sigmoid gradient, ids": (sigmoid_kernel, {"HAS_IDS": True, "WITH_GRADIENT": True}),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_kernels_fit(case: str, dtype: torch.dtype, capability: int) -> None:
    kernel, flags = CASES[case]
    tile = tiling(dtype, capability)
    types = dict.fromkeys(POINTERS_FP32, "*fp32") | dict.fromkeys(SIZES, "i32")
    types |= {"rows": DTYPES[dtype], "columns": DTYPES[dtype], "gradient": DTYPES[dtype]}
    types |= {"row_ids": "*i64", "column_ids": "*i64", "smoothing": "fp32", "gain": "fp32"}
    for even in (True, False):
        constants = {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "EVEN_K": even,
            **flags,
        }
        needs = compile_kernel(
            kernel, types, constants, capability, num_warps=tile.warps, num_stages=tile.stages
        )
        print(f"sm_{capability} {dtype} {case}, whole blocks of dims {even}: {needs}")
        assert needs.stack == 0
        assert needs.shared <= SHARED_LIMIT[capability]
        assert needs.matrix_instructions > 0 or dtype == torch.float32
