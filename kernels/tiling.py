"""What the Triton kernels share: tile sizes per architecture, a tile of products.

Imported by kernel modules only, which are loaded at the first call that needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tiling:
    """Launch configuration of a kernel whose programs each compute one tile of S."""

    block_m: int
    """Rows of a tile."""

    block_n: int
    """Columns of a tile."""

    block_k: int
    """Dims multiplied at a time."""

    warps: int
    stages: int


# Chosen by the compiler's own report (registers, spills, shared memory); not yet timed on a GPU.
_HALF = {
    80: Tiling(128, 128, 32, 8, 3),
    90: Tiling(128, 128, 64, 8, 3),
    100: Tiling(128, 64, 64, 8, 3),
}
_SINGLE = Tiling(64, 64, 16, 8, 2)
_INTERPRETED = Tiling(32, 32, 32, 1, 1)


def tiling(dtype: torch.dtype, capability: int | None) -> Tiling:
    """Configuration for operands of `dtype` on sm_`capability`; None is the interpreter."""
    if capability is None:
        return _INTERPRETED
    if dtype == torch.float32:
        return _SINGLE
    known = max((number for number in _HALF if number <= capability), default=80)
    return _HALF[known]


def capability_of(tensor: torch.Tensor) -> int | None:
    """80, 90, 100 … for a CUDA tensor, None for one on the CPU."""
    if not tensor.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@triton.jit
def similarity_tile(
    rows,
    columns,
    row_index,
    column_index,
    row_count,
    column_count,
    row_stride,
    column_stride,
    dims,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Dot products of BLOCK_M rows with BLOCK_N columns, fp32; IEEE for fp32 operands."""
    k = tl.arange(0, BLOCK_K)
    row_pointer = rows + row_index.to(tl.int64)[:, None] * row_stride + k[None, :]
    column_pointer = columns + column_index.to(tl.int64)[None, :] * column_stride + k[:, None]
    row_inside = row_index[:, None] < row_count
    column_inside = column_index[None, :] < column_count
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, dims, BLOCK_K):
        if EVEN_K:
            a = tl.load(row_pointer + first, mask=row_inside, other=0.0)
            b = tl.load(column_pointer + first, mask=column_inside, other=0.0)
        else:
            left = dims - first
            a = tl.load(row_pointer + first, mask=row_inside & (k[None, :] < left), other=0.0)
            b = tl.load(column_pointer + first, mask=column_inside & (k[:, None] < left), other=0.0)
        products = tl.dot(a, b, products, input_precision="ieee")
    return products
