"""What the Triton kernels share: tile sizes per architecture, a tile of products, blocks of S.

Imported by kernel modules only, which are loaded at the first call that needs Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ELEMENTS = 1 << 28
"""Entries of G held at a time (512 MiB in bf16)."""

FP16_GAIN = 2.0**14
"""fp16 entries of G are held multiplied by this: |G| ≤ 2, and most entries are below 2⁻¹⁴."""

LOG2_E = tl.constexpr(1.4426950408889634)


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
# For an epilogue that holds more than the products. With few registers a thread, two blocks of
# threads share a multiprocessor: one multiplies while the other is in its epilogue.
_HALF_NARROW = {
    80: Tiling(128, 64, 32, 8, 3),
    90: Tiling(128, 64, 64, 8, 3),
    100: Tiling(128, 64, 64, 8, 3),
}
_SINGLE = Tiling(64, 64, 16, 8, 2)
_INTERPRETED = Tiling(32, 32, 32, 1, 1)


def tiling(dtype: torch.dtype, capability: int | None, *, narrow: bool = False) -> Tiling:
    """Configuration for operands of `dtype` on sm_`capability`; None is the interpreter."""
    if capability is None:
        return _INTERPRETED
    if dtype == torch.float32:
        return _SINGLE
    known = max((number for number in _HALF if number <= capability), default=80)
    return (_HALF_NARROW if narrow else _HALF)[known]


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


def operands(rows: Tensor, columns: Tensor, *scalars: Tensor) -> tuple[Tensor, ...]:
    """Features with neighbouring dims, and scalars as fp32 []."""
    if rows.dtype == torch.float64:
        raise TypeError("the Triton kernels take fp32, bf16 and fp16; use the reference for fp64")
    features = (x if x.stride(-1) == 1 else x.contiguous() for x in (rows, columns))
    return (*features, *(scalar.float().reshape(()) for scalar in scalars))


class Block(NamedTuple):
    """A part of S or G that is held at one time: rows × columns."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def first_of_rows(self) -> bool:
        """Whether no earlier block had these rows."""
        return self.columns.start == 0

    @property
    def first_of_columns(self) -> bool:
        """Whether no earlier block had these columns."""
        return self.rows.start == 0


def blocks(rows: int, columns: int, elements: int) -> list[Block]:
    """Blocks of at most so many elements, whole tiles; square, since each adds both its products.

    A wide one would write the product of its columns, N·D numbers, for a few rows.
    """
    height = min(_whole_tiles(math.isqrt(elements)), _whole_tiles(rows + 127))
    width = _whole_tiles(elements // height)
    return [
        Block(slice(top, min(top + height, rows)), slice(left, min(left + width, columns)))
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def _whole_tiles(size: int) -> int:
    return max(128, size // 128 * 128)


def gain_of(dtype: torch.dtype) -> float:
    """What entries of G are multiplied by while they are held in `dtype`."""
    return FP16_GAIN if dtype == torch.float16 else 1.0


class ProductsWithG:
    """G·columns and Gᵀ·rows in fp32, one block of G after the other, by the library."""

    def __init__(
        self, rows: Tensor, columns: Tensor, need_rows: bool, need_columns: bool, gain: float
    ) -> None:
        self.rows, self.columns, self.gain = rows, columns, gain
        fp32 = torch.float32
        self.of_rows = rows.new_empty(rows.shape, dtype=fp32) if need_rows else None
        self.of_columns = columns.new_empty(columns.shape, dtype=fp32) if need_columns else None
        if rows.shape[0] == 0 or columns.shape[0] == 0:  # no block will come
            for products in (self.of_rows, self.of_columns):
                if products is not None:
                    products.zero_()

    def add(self, gradient: Tensor, block: Block) -> None:
        """A block of G, multiplied by the gain."""
        rows, columns = self.rows[block.rows], self.columns[block.columns]
        if self.of_rows is not None:
            _matmul(gradient, columns, self.of_rows[block.rows], add=not block.first_of_rows)
        if self.of_columns is not None:
            target = self.of_columns[block.columns]
            _matmul(gradient.T, rows, target, add=not block.first_of_columns)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Products with rows and with columns, without the gain."""
        if self.gain != 1:
            for products in (self.of_rows, self.of_columns):
                if products is not None:
                    products /= self.gain
        return self.of_rows, self.of_columns


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result, whatever the operands' dtype."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)
    _matmul(a, b, out, add=False)
    return out


def _matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b: fp32, whatever the operands' dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        return
    a, b = a.float(), b.float()
    if add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
