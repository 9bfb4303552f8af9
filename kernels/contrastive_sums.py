"""Triton kernels of `fastclip.kernels.contrastive` that add up what tiles leave; O(N) or O(N·D).

Each sum has one order, so that results do not depend on scheduling.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastclip.kernels.tiling import LOG2_E


@triton.jit
def _merge(largest, total, result, index, tiles, count, ADD: tl.constexpr, TILES: tl.constexpr):
    """Log-sum-exp over tiles of `count` rows' or columns' sums, the logarithm in fp64."""
    inside = index < count
    before = tl.full(index.shape, float("-inf"), tl.float64)
    if ADD:
        before = tl.load(result + index, mask=inside, other=float("-inf"))
    most = before.to(tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)[:, None]
        place = tile.to(tl.int64) * count + index[None, :]
        mask = (tile < tiles) & inside[None, :]
        sums = tl.load(total + place, mask=mask, other=0.0)
        tops = tl.load(largest + place, mask=mask, other=0.0)
        most = tl.maximum(most, tl.max(tl.where(sums == 0.0, float("-inf"), tops), axis=0))
    most = tl.where(most == float("-inf"), 0.0, most)
    whole = tl.exp(before - most)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)[:, None]
        place = tile.to(tl.int64) * count + index[None, :]
        mask = (tile < tiles) & inside[None, :]
        sums = tl.load(total + place, mask=mask, other=0.0)
        tops = tl.load(largest + place, mask=mask, other=0.0)
        weight = tl.exp2((tl.where(sums == 0.0, float("-inf"), tops) - most[None, :]) * LOG2_E)
        whole += tl.sum((sums * weight).to(tl.float64), axis=0)
    tl.store(result + index, tl.log(whole) + most, mask=inside)


@triton.jit
def merge_kernel(
    row_largest,
    row_sum,
    column_largest,
    column_sum,
    others_of_row,
    others_of_column,
    row_count,
    column_count,
    tiles_m,
    tiles_n,
    ADD_ROWS: tl.constexpr,
    ADD_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Both directions' log-sum-exps, added to what earlier blocks of the rows or columns left."""
    block = tl.program_id(0)
    row_blocks = tl.cdiv(row_count, BLOCK)
    if block < row_blocks:
        index = block * BLOCK + tl.arange(0, BLOCK)
        _merge(row_largest, row_sum, others_of_row, index, tiles_n, row_count, ADD_ROWS, TILES)
    else:
        index = (block - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        _merge(
            column_largest, column_sum, others_of_column, index, tiles_m, column_count,
            ADD_COLUMNS, TILES,
        )  # fmt: skip


@triton.jit
def _log1p_exp(x):
    """log(1 + e^x) in fp64, to all its digits."""
    small = tl.exp(-tl.abs(x))
    # By Kahan: what rounding did to 1 + small is divided out again.
    rounded = 1.0 + small
    moved = rounded - 1.0
    exact = tl.log(rounded) * (small / tl.where(moved == 0.0, 1.0, moved))
    return tl.where(x > 0, x, 0.0) + tl.where(moved == 0.0, small, exact)


@triton.jit
def _share(x):
    """1 / (1 + e^−x), fp64, to all its digits where it is small."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, small) / (1.0 + small)


@triton.jit
def _power_and_weight(others, share):
    """n and w with e^n·w = share·e^−others: n's rounding alone would move a whole row of G."""
    power = (-others).to(tl.float32)
    weight = (tl.exp(-others - power.to(tl.float64)) * share).to(tl.float32)
    nothing = others == float("-inf")
    return tl.where(nothing, 0.0, power), tl.where(nothing, 0.0, weight)


@triton.jit
def summary_kernel(
    others_of_row,
    others_of_column,
    product_of_column,
    scale,
    gap,
    own_target,
    loss_partial,
    row_power,
    row_weight,
    column_power,
    column_weight,
    own_entry,
    row_count,
    column_count,
    row_offset,
    pair_count,
    HAS_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Terms of a few columns and of the rows that they belong to, and their part of the loss."""
    s = tl.load(scale)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < column_count
    own = (tl.load(product_of_column + column, mask=inside, other=0.0) * s).to(tl.float64)
    of_column = tl.load(others_of_column + column, mask=inside, other=0.0)
    column_share = _share(of_column - own)
    power, weight = _power_and_weight(of_column, column_share)
    tl.store(column_power + column, power, mask=inside)
    tl.store(column_weight + column, weight, mask=inside)
    row = column - row_offset
    mine = inside & (row >= 0) & (row < row_count)
    of_row = tl.load(others_of_row + row, mask=mine, other=0.0)
    row_share = _share(of_row - own)
    power, weight = _power_and_weight(of_row, row_share)
    tl.store(row_power + row, power, mask=mine)
    tl.store(row_weight + row, weight, mask=mine)
    entry = -(row_share + column_share).to(tl.float32)
    if HAS_TARGET:
        entry += 2.0 * (1.0 - tl.load(own_target + row, mask=mine, other=1.0))
    tl.store(own_entry + row, entry, mask=mine)
    pair = (_log1p_exp(of_row - own) + _log1p_exp(of_column - own)) / 2
    pair += tl.load(gap + row, mask=mine, other=0.0).to(tl.float64)
    total = tl.sum(tl.where(mine, pair, 0.0))
    tl.store(loss_partial + tl.program_id(0), total / pair_count)


@triton.jit
def dot_kernel(
    features,
    products,
    partial,
    count,
    dims,
    features_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of a few rows' Σ features·products."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    place = row.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for first in range(0, dims, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)[None, :]
        mask = (row[:, None] < count) & (dim < dims)
        x = tl.load(features + place * features_stride + dim, mask=mask, other=0.0)
        total += x.to(tl.float32) * tl.load(products + place * dims + dim, mask=mask, other=0.0)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, axis=1)))


@triton.jit
def scale_kernel(
    scale_partial,
    own_entry,
    own_product,
    upstream,
    d_scale,
    partials,
    row_count,
    factor,
    BLOCK: tl.constexpr,
):
    """The scale's gradient from the tiles' parts and the own pairs, by a single program."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, partials, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(scale_partial + place, mask=place < partials, other=0.0).to(tl.float64)
    for first in range(0, row_count, BLOCK):
        row = first + tl.arange(0, BLOCK)
        entry = tl.load(own_entry + row, mask=row < row_count, other=0.0)
        product = tl.load(own_product + row, mask=row < row_count, other=0.0)
        total += entry.to(tl.float64) * product.to(tl.float64)
    tl.store(d_scale, (tl.sum(total) * factor * tl.load(upstream)).to(tl.float32))
