"""The sigmoid loss's pass over S in Triton; see `fastclip.kernels.reference`.

Every entry is its own yes-or-no question, so one pass makes the loss and G together; where no
gradient is wanted, the loss alone. Tiles, partial results, blocks and the own pairs' place outside
of G are as in `fastclip.kernels.contrastive`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.reference import SigmoidProducts
from fastclip.kernels.tiling import (
    BLOCK_ELEMENTS,
    LOG2_E,
    Block,
    ProductsWithG,
    blocks,
    capability_of,
    gain_of,
    operands,
    similarity_tile,
    tiling,
)


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
def _log1p(x):
    """log(1 + x) for x in [0, 1]: x times a polynomial, relative error 1.6e-7 in fp32.

    Interpolated at Chebyshev's nodes. The hardware's logarithm of 1 + x would lose a small x.
    """
    p = 0.01954252743780671 - 0.0031760570527694654 * x
    p = -0.056373613209643736 + p * x
    p = 0.10543623839523661 + p * x
    p = -0.15269667104466478 + p * x
    p = 0.19663274269437397 + p * x
    p = -0.2495161626572586 + p * x
    p = 0.33329710499262943 + p * x
    p = -0.49999892648080163 + p * x
    return (0.9999999946562934 + p * x) * x


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
    """A tile's sum of −log σ(±logit); its G = ∓σ(∓logit) and parts of scale's and bias's gradients.

    Own pairs are left out of G, but are in the sums.
    """
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
    tile_place = tile_m * tl.num_programs(1) + tile_n
    softplus = tl.where(wrong > 0, wrong, 0.0) + _log1p(small)
    softplus = tl.where(inside, softplus, 0.0)
    tl.store(loss_partial + tile_place, tl.sum(tl.sum(softplus, axis=1)))
    if WITH_GRADIENT:
        slope = tl.where(wrong > 0, 1.0, small) / (1.0 + small)
        g = tl.where(inside, tl.where(positive, -slope, slope), 0.0)
        own = (row_index[:, None] + row_offset) == column_index[None, :]
        place = row_index.to(tl.int64)[:, None] * column_count + column_index[None, :]
        kept = tl.where(own, 0.0, g * gain)
        tl.store(gradient + place, kept.to(gradient.dtype.element_ty), mask=inside)
        tl.store(scale_partial + tile_place, tl.sum(tl.sum(g * products, axis=1)))
        tl.store(bias_partial + tile_place, tl.sum(tl.sum(g, axis=1)))


def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    pair_count: int | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """This rank's rows' part of the loss; `reference.sigmoid_loss` (no fp64)."""
    rows, columns, scale, bias = operands(rows, columns, scale, bias)
    sums = scale.new_zeros(3, dtype=torch.float64)
    for block in blocks(rows.shape[0], columns.shape[0], block_elements):
        sums += _launch(rows, columns, scale, bias, row_offset, row_ids, column_ids, block, None)
    return (sums[0] / (pair_count or columns.shape[0])).float()


def sigmoid_products(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    product: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    pair_count: int | None = None,
    need_rows: bool = True,
    need_columns: bool = True,
    block_elements: int = BLOCK_ELEMENTS,
) -> SigmoidProducts:
    """`reference.sigmoid_products` (no fp64)."""
    rows, columns, scale, bias = operands(rows, columns, scale, bias)
    count = columns.shape[0]
    products = ProductsWithG(rows, columns, need_rows, need_columns, gain_of(rows.dtype))
    sums = scale.new_zeros(3, dtype=torch.float64)
    for block in blocks(rows.shape[0], count, block_elements):
        gradient = rows.new_empty(block.shape)
        sums += _launch(
            rows, columns, scale, bias, row_offset, row_ids, column_ids, block, gradient
        )
        products.add(gradient, block)
        del gradient  # or the next block would be made beside it
    own_entry = -torch.sigmoid(-(scale * product + bias))
    loss, d_scale, d_bias = (sums / (pair_count or count)).float()
    return SigmoidProducts(loss, *products.finish(), d_scale, d_bias, own_entry)


def _launch(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_offset: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    block: Block,
    gradient: Tensor | None,
) -> Tensor:
    """A block's sums, fp64 [3]: loss, scale's and bias's gradient (0 without G)."""
    (height, width), dims = block.shape, rows.shape[1]
    chunk, others = rows[block.rows], columns[block.columns]
    tile = tiling(rows.dtype, capability_of(rows), narrow=gradient is not None)
    grid = (triton.cdiv(height, tile.block_m), triton.cdiv(width, tile.block_n))
    partial = scale.new_zeros((3, *grid))
    has_ids = row_ids is not None and column_ids is not None
    sigmoid_kernel[grid](
        chunk, others, scale, bias,
        row_ids[block.rows].contiguous() if has_ids else scale,
        column_ids[block.columns].contiguous() if has_ids else scale,
        partial[0], gradient if gradient is not None else partial, partial[1], partial[2],
        height, width, dims, chunk.stride(0), others.stride(0),
        row_offset + block.rows.start - block.columns.start, gain_of(rows.dtype),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        EVEN_K=dims % tile.block_k == 0, HAS_IDS=has_ids, WITH_GRADIENT=gradient is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial.sum((1, 2), dtype=torch.float64)
