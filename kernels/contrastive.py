"""The softmax contrastive loss's two passes over S in Triton; see `fastclip.kernels.reference`.

Each program computes one tile of the similarity matrix and leaves partial results: a log-sum-exp
per row and per column of the tile in the first pass, the tile of G and its part of the scale's
gradient in the second. A second step adds the partial results up in a fixed order, so that the
outcome does not depend on scheduling; there are no atomics. The products G·T and Gᵀ·I are matrix
multiplications of the library’s. A chunk of rows bounds what is held: neither S nor G is whole.

The maximum that an exponential is taken relative to is the tile's own, row by row and column by
column, so that no scale under- or overflows.

The own pair is kept out of G, whose low-precision entries cannot hold p_ii − 1 where p_ii is close
to 1, and added in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.reference import ContrastiveGradients, ContrastiveStatistics, split
from fastclip.kernels.tiling import LOG2_E, capability_of, similarity_tile, tiling

CHUNK_ELEMENTS = 1 << 28
"""Entries of G held at a time (512 MiB in bf16)."""

FP16_GAIN = 2.0**14
"""fp16 entries of G are held multiplied by this: |G| ≤ 2, and most entries are below 2⁻¹⁴."""


@triton.jit
def _targets_tile(
    row_index,
    column_index,
    own,
    row_ids,
    column_ids,
    positives,
    row_count,
    column_count,
    smoothing,
    HAS_IDS: tl.constexpr,
):
    """Targets of a tile: even over a row's positives, smoothed over all."""
    if HAS_IDS:
        row_id = tl.load(row_ids + row_index, mask=row_index < row_count, other=0)
        column_id = tl.load(column_ids + column_index, mask=column_index < column_count, other=0)
        share = 1.0 / tl.load(positives + row_index, mask=row_index < row_count, other=1.0)
        hits = tl.where(row_id[:, None] == column_id[None, :], share[:, None], 0.0)
    else:
        hits = tl.where(own, 1.0, 0.0)
    return hits * (1.0 - smoothing) + smoothing / column_count


@triton.jit
def _largest_and_sum(logits, AXIS: tl.constexpr):
    """A maximum along an axis, 0 where there is nothing, and the sum of exponentials below it.

    Their logarithm is taken later, in fp64: rounded to fp32 here, it would be off by 4e-6 near 80.
    """
    largest = tl.max(logits, axis=AXIS)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    if AXIS == 1:
        total = tl.sum(tl.exp2((logits - largest[:, None]) * LOG2_E), axis=1)
    else:
        total = tl.sum(tl.exp2((logits - largest[None, :]) * LOG2_E), axis=0)
    return largest, total


@triton.jit
def statistics_kernel(
    rows,
    columns,
    scale,
    own_logit,
    row_ids,
    column_ids,
    positives,
    row_largest,
    row_sum,
    column_largest,
    column_sum,
    gap_partial,
    row_count,
    column_count,
    dims,
    row_stride,
    column_stride,
    row_offset,
    smoothing,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_GAP: tl.constexpr,
):
    """Maxima and sums of a tile's rows and columns without the own pairs, and the rows' gap."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    row_index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    products = similarity_tile(
        rows, columns, row_index, column_index, row_count, column_count, row_stride, column_stride,
        dims, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    s = tl.load(scale)
    inside = (row_index[:, None] < row_count) & (column_index[None, :] < column_count)
    own = (row_index[:, None] + row_offset) == column_index[None, :]
    others = inside & (own == 0)
    logits = tl.where(others, products * s, float("-inf"))
    largest, total = _largest_and_sum(logits, 1)
    row_place = tile_n.to(tl.int64) * row_count + row_index
    tl.store(row_largest + row_place, largest, mask=row_index < row_count)
    tl.store(row_sum + row_place, total, mask=row_index < row_count)
    largest, total = _largest_and_sum(logits, 0)
    column_place = tile_m.to(tl.int64) * column_count + column_index
    tl.store(column_largest + column_place, largest, mask=column_index < column_count)
    tl.store(column_sum + column_place, total, mask=column_index < column_count)
    if HAS_GAP:
        targets = _targets_tile(
            row_index, column_index, own, row_ids, column_ids, positives, row_count, column_count,
            smoothing, HAS_IDS,
        )  # fmt: skip
        mine = tl.load(own_logit + row_index, mask=row_index < row_count, other=0.0)
        # Differences before the weighting: large logits of either sign cancel exactly.
        difference = tl.where(others, mine[:, None] - products * s, 0.0)
        tl.store(
            gap_partial + row_place,
            tl.sum(targets * difference, axis=1),
            mask=row_index < row_count,
        )


@triton.jit
def gradient_kernel(
    rows,
    columns,
    scale,
    row_lse,
    row_rest,
    column_lse,
    column_rest,
    row_ids,
    column_ids,
    positives,
    gradient,
    scale_partial,
    row_count,
    column_count,
    dims,
    row_stride,
    column_stride,
    row_offset,
    smoothing,
    gain,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """A tile of G = e^{S−R} + e^{S−C} − 2T, own pairs zero, and its part of Σ G·(I·Tᵀ)."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    row_index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    products = similarity_tile(
        rows, columns, row_index, column_index, row_count, column_count, row_stride, column_stride,
        dims, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    logits = products * tl.load(scale)
    inside = (row_index[:, None] < row_count) & (column_index[None, :] < column_count)
    own = (row_index[:, None] + row_offset) == column_index[None, :]
    # R and C in two parts each: the rounding of one fp32 number would move a whole row of G.
    r = tl.load(row_lse + row_index, mask=row_index < row_count, other=0.0)
    r_rest = tl.load(row_rest + row_index, mask=row_index < row_count, other=0.0)
    c = tl.load(column_lse + column_index, mask=column_index < column_count, other=0.0)
    c_rest = tl.load(column_rest + column_index, mask=column_index < column_count, other=0.0)
    g = tl.exp2((logits - r[:, None] - r_rest[:, None]) * LOG2_E)
    g += tl.exp2((logits - c[None, :] - c_rest[None, :]) * LOG2_E)
    if HAS_TARGETS:
        g -= 2.0 * _targets_tile(
            row_index, column_index, own, row_ids, column_ids, positives, row_count, column_count,
            smoothing, HAS_IDS,
        )  # fmt: skip
    g = tl.where(inside & (own == 0), g, 0.0)
    place = row_index.to(tl.int64)[:, None] * column_count + column_index[None, :]
    tl.store(gradient + place, (g * gain).to(gradient.dtype.element_ty), mask=inside)
    # Per row: the compiler cannot reduce a tile to one number on sm_100.
    row_place = tile_n.to(tl.int64) * row_count + row_index
    tl.store(scale_partial + row_place, tl.sum(g * products, axis=1), mask=row_index < row_count)


def contrastive_statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ContrastiveStatistics:
    """First pass; arguments and results are `reference.contrastive_statistics`'s (no fp64)."""
    rows, columns, scale = operands(rows, columns, scale)
    total, count = rows.shape[0], columns.shape[0]
    own = _own_logits(rows, columns, scale, row_offset)
    others_of_row, gap = torch.empty_like(own, dtype=torch.float64), torch.zeros_like(own)
    others_of_column = own.new_full((count,), float("-inf"), dtype=torch.float64)
    positives = _positives(row_ids, column_ids)
    tile = tiling(rows.dtype, capability_of(rows))
    has_gap = row_ids is not None or label_smoothing > 0
    for first, last in chunks(total, count, chunk_elements):
        chunk = rows[first:last]
        tiles_m, tiles_n = triton.cdiv(last - first, tile.block_m), triton.cdiv(count, tile.block_n)
        row_partial = own.new_empty((2, tiles_n, last - first))
        column_partial = own.new_empty((2, tiles_m, count))
        gap_partial = own.new_empty((tiles_n, last - first)) if has_gap else own
        statistics_kernel[(tiles_m, tiles_n)](
            chunk, columns, scale, own[first:last],
            *_ids(row_ids, column_ids, positives, first, last, own),
            *row_partial, *column_partial, gap_partial,
            last - first, count, rows.shape[1], chunk.stride(0), columns.stride(0),
            row_offset + first, label_smoothing,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            EVEN_K=rows.shape[1] % tile.block_k == 0, HAS_IDS=row_ids is not None, HAS_GAP=has_gap,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        others_of_row[first:last] = _merged(*row_partial)
        others_of_column = torch.logaddexp(others_of_column, _merged(*column_partial))
        if has_gap:
            gap[first:last] = gap_partial.sum(0)
    return ContrastiveStatistics(others_of_row, others_of_column, own, gap)


def contrastive_gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    others_of_row: Tensor,
    others_of_column: Tensor,
    own_of_column: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    need_rows: bool = True,
    need_columns: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ContrastiveGradients:
    """Second pass; arguments and results are `reference.contrastive_gradients`'s (no fp64)."""
    rows, columns, scale = operands(rows, columns, scale)
    total, count = rows.shape[0], columns.shape[0]
    own_slice = slice(row_offset, row_offset + total)
    own = own_of_column[own_slice]
    row_lse = split(torch.logaddexp(others_of_row, own.double()), torch.float32)
    column_lse = split(torch.logaddexp(others_of_column, own_of_column.double()), torch.float32)
    positives = _positives(row_ids, column_ids)
    own_entry = -torch.sigmoid((others_of_row - own).float())
    own_entry -= torch.sigmoid((others_of_column[own_slice] - own).float())
    if row_ids is not None or label_smoothing > 0:
        share = 1.0 / positives if positives is not None else torch.ones_like(own)
        own_entry += 2 * (1 - share * (1 - label_smoothing) - label_smoothing / count)
    gain = FP16_GAIN if rows.dtype == torch.float16 else 1.0
    tile = tiling(rows.dtype, capability_of(rows))
    d_rows = rows.new_empty(rows.shape, dtype=torch.float32) if need_rows else None
    d_columns = columns.new_zeros(columns.shape, dtype=torch.float32) if need_columns else None
    d_scale = own.new_zeros(())
    for first, last in chunks(total, count, chunk_elements):
        chunk = rows[first:last]
        grid = (triton.cdiv(last - first, tile.block_m), triton.cdiv(count, tile.block_n))
        gradient = rows.new_empty((last - first, count))
        scale_partial = own.new_empty((grid[1], last - first))
        gradient_kernel[grid](
            chunk, columns, scale, *(part[first:last] for part in row_lse), *column_lse,
            *_ids(row_ids, column_ids, positives, first, last, own),
            gradient, scale_partial,
            last - first, count, rows.shape[1], chunk.stride(0), columns.stride(0),
            row_offset + first, label_smoothing, gain,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            EVEN_K=rows.shape[1] % tile.block_k == 0, HAS_IDS=row_ids is not None,
            HAS_TARGETS=row_ids is not None or label_smoothing > 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        d_scale += scale_partial.sum()
        if d_rows is not None:
            d_rows[first:last] = matmul_fp32(gradient, columns)
        if d_columns is not None:
            d_columns += matmul_fp32(gradient.T, chunk)
    d_scale += (own_entry * _own_products(rows, columns, row_offset)).sum()
    factor = scale / (2 * count)
    if d_rows is not None:
        d_rows.div_(gain).addcmul_(own_entry[:, None], columns[own_slice].float()).mul_(factor)
    if d_columns is not None:
        d_columns.div_(gain)
        d_columns[own_slice].addcmul_(own_entry[:, None], rows.float())
        d_columns.mul_(factor)
    return ContrastiveGradients(d_rows, d_columns, d_scale / (2 * count))


def operands(rows: Tensor, columns: Tensor, *scalars: Tensor) -> tuple[Tensor, ...]:
    """Features with neighbouring dims, and scalars as fp32 []."""
    if rows.dtype == torch.float64:
        raise TypeError("the Triton kernels take fp32, bf16 and fp16; use the reference for fp64")
    features = (x if x.stride(-1) == 1 else x.contiguous() for x in (rows, columns))
    return (*features, *(scalar.float().reshape(()) for scalar in scalars))


def _merged(largest: Tensor, total: Tensor) -> Tensor:
    """Log-sum-exp over tiles, fp64, of their maxima and sums [tiles, …]."""
    largest = largest.double().masked_fill(total == 0, float("-inf"))
    shift = largest.amax(0)
    shift = shift.masked_fill(shift == float("-inf"), 0.0)
    return (total * (largest - shift).exp()).sum(0).log() + shift


def _own_products(rows: Tensor, columns: Tensor, row_offset: int) -> Tensor:
    """Dot product of each pair, fp32 [b]."""
    own = columns[row_offset : row_offset + rows.shape[0]]
    return (rows.float() * own.float()).sum(1)


def _own_logits(rows: Tensor, columns: Tensor, scale: Tensor, row_offset: int) -> Tensor:
    return scale * _own_products(rows, columns, row_offset)


def _positives(row_ids: Tensor | None, column_ids: Tensor | None) -> Tensor | None:
    """How many columns share each row's id, fp32 [b]."""
    if row_ids is None or column_ids is None:
        return None
    ordered = column_ids.sort().values
    last = torch.searchsorted(ordered, row_ids, right=True)
    return (last - torch.searchsorted(ordered, row_ids)).float()


def _ids(
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    positives: Tensor | None,
    first: int,
    last: int,
    unused: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' three pointers; anything where there are no ids, since they are not read."""
    if row_ids is None or column_ids is None or positives is None:
        return unused, unused, unused
    return row_ids[first:last].contiguous(), column_ids.contiguous(), positives[first:last]


def chunks(rows: int, count: int, chunk_elements: int) -> list[tuple[int, int]]:
    """First and last row of each chunk; whole tiles, at least one."""
    size = max(128, chunk_elements // max(count, 1) // 128 * 128)
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result, whatever the operands' dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
