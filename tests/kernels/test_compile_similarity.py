"""The similarity kernels compile for sm_80, sm_90 and sm_100 without spills, as the losses' do.

No GPU is needed: ``pytest tests/kernels/test_compile_similarity.py -s`` prints the table.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter is on; it has no compiler", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from compile_only import SHARED_LIMIT, Needs, compile_kernel
from fastclip.kernels.similarity import (
    NORM_BLOCK,
    SELECT_ENTRIES,
    SELECT_WARPS,
    STREAMED_K,
    norm_kernel,
    select_kernel,
    similarity_kernel,
    slots_for,
    topk_kernel,
    topk_tiling,
)
from fastclip.kernels.tiling import Tiling, tiling

DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SIZES = ("query_count", "key_count", "row_count", "row_stride", "column_stride", "dims", "width")
COUNTS = ("k", "tiles_per_stretch", "blocks_per_stretch")
TYPES = (
    dict.fromkeys(SIZES, "i32")
    | dict.fromkeys(COUNTS, "i32")
    | dict.fromkeys(("query_norms", "key_norms", "norms", "scale", "values"), "*fp32")
    | dict.fromkeys(("lists", "indices"), "*i64")
)

pytestmark = pytest.mark.parametrize("capability", [80, 90, 100])


def _fits(needs: Needs, capability: int, name: str) -> None:
    print(f"sm_{capability} {name}: {needs}")
    assert needs.spilled == 0
    assert needs.shared <= SHARED_LIMIT[capability]


def _constants(tile: Tiling, **flags: bool | int) -> dict[str, bool | int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, **flags}


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_the_matrix_fits(dtype: torch.dtype, capability: int) -> None:
    tile = tiling(dtype, capability)
    for even, normalize, result in (
        (True, True, "*fp32"),
        (False, True, "*bf16"),
        (True, False, "*fp16"),
        (False, False, "*fp32"),
    ):
        needs = compile_kernel(
            similarity_kernel,
            TYPES | {"queries": DTYPES[dtype], "keys": DTYPES[dtype], "result": result},
            _constants(tile, EVEN_K=even, NORMALIZE=normalize, GROUP=8),
            capability,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _fits(needs, capability, f"{dtype} matrix, {even=} {normalize=} {result}")
        assert needs.matrix_instructions > 0 or dtype == torch.float32


@pytest.mark.parametrize("slots", [16, 32, 64])
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_lists_stay_in_registers(dtype: torch.dtype, slots: int, capability: int) -> None:
    assert slots <= slots_for(STREAMED_K)
    tile = topk_tiling(dtype, slots, capability)
    for even in (True, False):
        for normalize in (True, False):
            needs = compile_kernel(
                topk_kernel,
                TYPES | {"queries": DTYPES[dtype], "keys": DTYPES[dtype]},
                _constants(tile, EVEN_K=even, NORMALIZE=normalize, K=slots),
                capability,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            _fits(needs, capability, f"{dtype} list of {slots}, {even=} {normalize=}")
            assert needs.matrix_instructions > 0 or dtype == torch.float32


@pytest.mark.parametrize("slots", [16, 32, 64, 128, 256, 512, 1024])
def test_selection_fits(slots: int, capability: int) -> None:
    # Scores are selected from where lists are too long for registers; entries in any case.
    for from_scores in (False, True)[: 1 + (slots > slots_for(STREAMED_K))]:
        for to_lists in (False, True):
            needs = compile_kernel(
                select_kernel,
                TYPES | {"source": "*fp32" if from_scores else "*i64"},
                {
                    "K": slots,
                    "BLOCK_M": SELECT_ENTRIES // slots,
                    "FROM_SCORES": from_scores,
                    "TO_LISTS": to_lists,
                },
                capability,
                num_warps=SELECT_WARPS,
            )
            _fits(needs, capability, f"selection of {slots}, {from_scores=} {to_lists=}")


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_norms_fit(dtype: torch.dtype, capability: int) -> None:
    block_m, block_k = NORM_BLOCK
    needs = compile_kernel(
        norm_kernel,
        TYPES | {"features": DTYPES[dtype]},
        {"BLOCK_M": block_m, "BLOCK_K": block_k},
        capability,
        num_warps=4,
    )
    _fits(needs, capability, f"{dtype} norms")
