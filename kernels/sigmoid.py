"""The sigmoid loss's passes over S in Triton; see `fastclip.kernels.reference`.

Every entry is its own yes-or-no question, so one pass would do for loss and gradient together;
they are two functions because a forward without backward needs no G. Tiles, partial results and
chunks are `fastclip.kernels.contrastive`'s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.contrastive import (
    CHUNK_ELEMENTS,
    FP16_GAIN,
    chunks,
    matmul_fp32,
    operands,
)
from fastclip.kernels.reference import SigmoidGradients
from fastclip.kernels.tiling import LN_2, LOG2_E, capability_of, similarity_tile, tiling


@triton.jit
def _positive_tile(
    row_index, column_index, row_ids, column_ids, row_count, column_count, row_offset,
    HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Where a tile's questions have the answer yes."""
    if HAS_IDS:
        row_id = tl.load(row_ids + row_index, mask=row_index < row_count, other=0)
        column_id = tl.load(column_ids + column_index, mask=column_index < column_count, other=0)
        positive = row_id[:, None] == column_id[None, :]
    else:
        positive = (row_index[:, None] + row_offset) == column_index[None, :]
    return positive


@triton.jit
def sigmoid_kernel(
    rows,
    columns,
    scale,
    bias,
    row_ids,
    column_ids,
    loss_partial,
    gradient,
    scale_partial,
    bias_partial,
    row_count,
    column_count,
    dims,
    row_stride,
    column_stride,
    row_offset,
    gain,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """A tile's sum of −log σ(±logit), or its part of G = ∓σ(∓logit) and of scale's and bias's."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    row_index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    products = similarity_tile(
        rows, columns, row_index, column_index, row_count, column_count, row_stride, column_stride,
        dims, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    logits = products * tl.load(scale) + tl.load(bias)
    inside = (row_index[:, None] < row_count) & (column_index[None, :] < column_count)
    positive = _positive_tile(
        row_index, column_index, row_ids, column_ids, row_count, column_count, row_offset, HAS_IDS
    )
    wrong = tl.where(positive, -logits, logits)  # how far the answer is on the wrong side
    # Both branches of log(1 + e^x) and of its derivative from one exponential of −|x|.
    small = tl.exp2(-tl.abs(wrong) * LOG2_E)
    row_place = tile_n.to(tl.int64) * row_count + row_index
    row_inside = row_index < row_count
    if WITH_GRADIENT:
        slope = tl.where(wrong > 0, 1.0, small) / (1.0 + small)
        slope = tl.where(wrong == wrong, slope, wrong)  # NaN stays NaN
        g = tl.where(inside, tl.where(positive, -slope, slope), 0.0)
        place = row_index.to(tl.int64)[:, None] * column_count + column_index[None, :]
        tl.store(gradient + place, (g * gain).to(gradient.dtype.element_ty), mask=inside)
        tl.store(scale_partial + row_place, tl.sum(g * products, axis=1), mask=row_inside)
        tl.store(bias_partial + row_place, tl.sum(g, axis=1), mask=row_inside)
    else:
        # log(1 + small) by Kahan: what rounding did to 1 + small is divided out again.
        rounded = 1.0 + small
        moved = rounded - 1.0
        scaled = tl.log2(rounded) * LN_2 * (small / tl.where(moved == 0.0, 1.0, moved))
        tail = tl.where(moved == 0.0, small, scaled)
        softplus = tl.where(wrong > 0, wrong, 0.0) + tail
        softplus = tl.where(wrong == wrong, softplus, wrong)
        softplus = tl.where(inside, softplus, 0.0)
        tl.store(loss_partial + row_place, tl.sum(softplus, axis=1), mask=row_inside)


def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """This rank's rows' part of the loss; `reference.sigmoid_loss` (no fp64)."""
    rows, columns, scale, bias = operands(rows, columns, scale, bias)
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for first, last in chunks(rows.shape[0], columns.shape[0], chunk_elements):
        partial = _launch(
            rows, columns, scale, bias, row_offset, row_ids, column_ids, first, last, None
        )
        total += partial[0].sum(dtype=torch.float64)
    return total / columns.shape[0]


def sigmoid_gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    need_rows: bool = True,
    need_columns: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> SigmoidGradients:
    """Gradients of `sigmoid_loss`; `reference.sigmoid_gradients` (no fp64)."""
    rows, columns, scale, bias = operands(rows, columns, scale, bias)
    count = columns.shape[0]
    d_rows = rows.new_empty(rows.shape, dtype=torch.float32) if need_rows else None
    d_columns = columns.new_zeros(columns.shape, dtype=torch.float32) if need_columns else None
    d_scale, d_bias = scale.new_zeros(()), bias.new_zeros(())
    gain = FP16_GAIN if rows.dtype == torch.float16 else 1.0
    for first, last in chunks(rows.shape[0], count, chunk_elements):
        gradient = rows.new_empty((last - first, count))
        _, scale_partial, bias_partial = _launch(
            rows, columns, scale, bias, row_offset, row_ids, column_ids, first, last, gradient
        )
        d_scale += scale_partial.sum()
        d_bias += bias_partial.sum()
        if d_rows is not None:
            d_rows[first:last] = matmul_fp32(gradient, columns)
        if d_columns is not None:
            d_columns += matmul_fp32(gradient.T, rows[first:last])
    factor = scale / (count * gain)
    if d_rows is not None:
        d_rows *= factor
    if d_columns is not None:
        d_columns *= factor
    return SigmoidGradients(d_rows, d_columns, d_scale / count, d_bias / count)


def _launch(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_offset: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    first: int,
    last: int,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums of rows `first` to `last`: loss, scale's and bias's gradient."""
    chunk, count, dims = rows[first:last], columns.shape[0], rows.shape[1]
    tile = tiling(rows.dtype, capability_of(rows))
    grid = (triton.cdiv(last - first, tile.block_m), triton.cdiv(count, tile.block_n))
    partial = scale.new_empty((3, grid[1], last - first))
    has_ids = row_ids is not None and column_ids is not None
    sigmoid_kernel[grid](
        chunk, columns, scale, bias,
        row_ids[first:last].contiguous() if has_ids else scale,
        column_ids.contiguous() if has_ids else scale,
        partial[0], gradient if gradient is not None else partial, partial[1], partial[2],
        last - first, count, dims, chunk.stride(0), columns.stride(0), row_offset + first,
        FP16_GAIN if rows.dtype == torch.float16 else 1.0,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        EVEN_K=dims % tile.block_k == 0, HAS_IDS=has_ids, WITH_GRADIENT=gradient is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial[0], partial[1], partial[2]
