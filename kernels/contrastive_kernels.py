"""Triton kernels of `fastclip.kernels.contrastive`, which says what they are for."""

from __future__ import annotations

import triton
import triton.language as tl

from fastclip.kernels.tiling import LOG2_E, similarity_tile

HEADROOM = tl.constexpr(70.0)
"""A tile's exponentials are at most e^71, and e^−(71 + log N) is still a normal number."""

FLOOR = tl.constexpr(-50.0)
"""Relative to a tile's shift: log-sum-exps below may have lost a part that counts (N·e^−37)."""

SMALL_SUM = tl.constexpr(1.9287498479639178e-22)
"""e^FLOOR"""

LOG2_E_HIGH = tl.constexpr(1.44268798828125)
"""log₂e in 17 bits: whole numbers up to 127 times this are exact."""

LOG2_E_LOW = tl.constexpr(1.4426950408889634 - 1.44268798828125)


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
    pair_count,
    HAS_IDS: tl.constexpr,
):
    """Targets of a tile: even over a row's positives, smoothed over all pairs."""
    if HAS_IDS:
        row_id = tl.load(row_ids + row_index, mask=row_index < row_count, other=0)
        column_id = tl.load(column_ids + column_index, mask=column_index < column_count, other=0)
        share = 1.0 / tl.load(positives + row_index, mask=row_index < row_count, other=1.0)
        hits = tl.where(row_id[:, None] == column_id[None, :], share[:, None], 0.0)
    else:
        hits = tl.where(own, 1.0, 0.0)
    return hits * (1.0 - smoothing) + smoothing / pair_count


@triton.jit
def _shift(row_norm, column_norm, row_index, column_index, row_count, column_count, scale):
    """What a tile's logits are taken relative to, a whole number: 0, or their bound less headroom.

    Zero as long as it can be: a difference near the headroom is rounded to 4e-6.
    """
    row = tl.max(tl.load(row_norm + row_index, mask=row_index < row_count, other=0.0))
    norms = tl.load(column_norm + column_index, mask=column_index < column_count, other=0.0)
    # A little more than the bound, for the rounding of norms and products.
    bound = row * tl.max(norms) * tl.abs(scale) * 1.00002
    return tl.where(bound <= HEADROOM, 0.0, tl.floor(bound) - HEADROOM)


@triton.jit
def statistics_kernel(
    rows,
    columns,
    scale,
    own_product,
    row_norm,
    column_norm,
    row_ids,
    column_ids,
    positives,
    row_largest,
    row_sum,
    column_largest,
    column_sum,
    gap_partial,
    exponentials,
    row_count,
    column_count,
    dims,
    row_stride,
    column_stride,
    row_offset,
    smoothing,
    pair_count,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_GAP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Sums of a tile's rows and columns without the own pairs, and the rows' gap."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    row_index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    products = similarity_tile(
        rows, columns, row_index, column_index, row_count, column_count, row_stride, column_stride,
        dims, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    s = tl.load(scale)
    shift = _shift(row_norm, column_norm, row_index, column_index, row_count, column_count, s)
    inside = (row_index[:, None] < row_count) & (column_index[None, :] < column_count)
    own = (row_index[:, None] + row_offset) == column_index[None, :]
    others = inside & (own == 0)
    e = tl.where(others, tl.exp2((products * s - shift) * LOG2_E), 0.0)
    if KEEP:
        place = row_index.to(tl.int64)[:, None] * column_count + column_index[None, :]
        tl.store(exponentials + place, e.to(exponentials.dtype.element_ty), mask=inside)
    row_place = tile_n.to(tl.int64) * row_count + row_index
    column_place = tile_m.to(tl.int64) * column_count + column_index
    row_inside, column_inside = row_index < row_count, column_index < column_count
    tl.store(row_sum + row_place, tl.sum(e, axis=1), mask=row_inside)
    tl.store(column_sum + column_place, tl.sum(e, axis=0), mask=column_inside)
    tl.store(row_largest + row_place, tl.zeros((BLOCK_M,), tl.float32) + shift, mask=row_inside)
    tl.store(
        column_largest + column_place, tl.zeros((BLOCK_N,), tl.float32) + shift, mask=column_inside
    )
    if HAS_GAP:
        targets = _targets_tile(
            row_index, column_index, own, row_ids, column_ids, positives, row_count, column_count,
            smoothing, pair_count, HAS_IDS,
        )  # fmt: skip
        mine = tl.load(own_product + row_index, mask=row_inside, other=0.0) * s
        # Differences before the weighting: large logits of either sign cancel exactly.
        difference = tl.where(others, mine[:, None] - products * s, 0.0)
        tl.store(gap_partial + row_place, tl.sum(targets * difference, axis=1), mask=row_inside)


@triton.jit
def repair_kernel(
    rows,
    columns,
    scale,
    row_largest,
    row_sum,
    column_largest,
    column_sum,
    row_count,
    column_count,
    dims,
    row_stride,
    column_stride,
    row_offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sums relative to true maxima, for those of a few tiles that have too small ones.

    A kernel of its own: with both forms in one, registers spill. NaN counts as too small.
    """
    tile_m, first_tile = tl.program_id(0), tl.program_id(1) * TILES
    row_index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = row_index < row_count
    last_tile = tl.minimum(first_tile + TILES, tl.cdiv(column_count, BLOCK_N))
    for tile_n in range(first_tile, last_tile):
        column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        column_inside = column_index < column_count
        row_place = tl.cast(tile_n, tl.int64) * row_count + row_index
        column_place = tile_m.to(tl.int64) * column_count + column_index
        row_total = tl.load(row_sum + row_place, mask=row_inside, other=1.0)
        column_total = tl.load(column_sum + column_place, mask=column_inside, other=1.0)
        good_rows = tl.min((row_total >= SMALL_SUM).to(tl.int32))
        good_columns = tl.min((column_total >= SMALL_SUM).to(tl.int32))
        if good_rows + good_columns < 2:
            products = similarity_tile(
                rows, columns, row_index, column_index, row_count, column_count, row_stride,
                column_stride, dims, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
            )  # fmt: skip
            inside = row_inside[:, None] & column_inside[None, :]
            own = (row_index[:, None] + row_offset) == column_index[None, :]
            logits = products * tl.load(scale)
            logits = tl.where(inside & (own == 0), logits, float("-inf"))
            largest = tl.max(logits, axis=1)
            largest = tl.where(largest == float("-inf"), 0.0, largest)
            total = tl.sum(tl.exp2((logits - largest[:, None]) * LOG2_E), axis=1)
            tl.store(row_largest + row_place, largest, mask=row_inside)
            tl.store(row_sum + row_place, total, mask=row_inside)
            largest = tl.max(logits, axis=0)
            largest = tl.where(largest == float("-inf"), 0.0, largest)
            total = tl.sum(tl.exp2((logits - largest[None, :]) * LOG2_E), axis=0)
            tl.store(column_largest + column_place, largest, mask=column_inside)
            tl.store(column_sum + column_place, total, mask=column_inside)


@triton.jit
def _store_gradient(
    g,
    row_index,
    column_index,
    row_ids,
    column_ids,
    positives,
    gradient,
    row_count,
    column_count,
    row_offset,
    smoothing,
    pair_count,
    gain,
    HAS_IDS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """Store a tile of G, own pairs and what is outside being zero, and return it."""
    inside = (row_index[:, None] < row_count) & (column_index[None, :] < column_count)
    own = (row_index[:, None] + row_offset) == column_index[None, :]
    if HAS_TARGETS:
        g -= 2.0 * _targets_tile(
            row_index, column_index, own, row_ids, column_ids, positives, row_count, column_count,
            smoothing, pair_count, HAS_IDS,
        )  # fmt: skip
    g = tl.where(inside & (own == 0), g, 0.0)
    place = row_index.to(tl.int64)[:, None] * column_count + column_index[None, :]
    tl.store(gradient + place, (g * gain).to(gradient.dtype.element_ty), mask=inside)
    return g


@triton.jit
def _gradient_tile(
    rows,
    columns,
    scale,
    row_power,
    row_weight,
    column_power,
    column_weight,
    row_ids,
    column_ids,
    positives,
    gradient,
    row_index,
    column_index,
    row_count,
    column_count,
    dims,
    row_stride,
    column_stride,
    row_offset,
    smoothing,
    pair_count,
    gain,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """Store a tile of G = q_i·e^{S−O_i} + q_j·e^{S−O_j} − 2T; return it and the products."""
    products = similarity_tile(
        rows, columns, row_index, column_index, row_count, column_count, row_stride, column_stride,
        dims, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    logits = products * tl.load(scale)
    row_inside, column_inside = row_index < row_count, column_index < column_count
    power = tl.load(row_power + row_index, mask=row_inside, other=0.0)
    weight = tl.load(row_weight + row_index, mask=row_inside, other=0.0)
    g = tl.exp2((logits + power[:, None]) * LOG2_E) * weight[:, None]
    powers = tl.load(column_power + column_index, mask=column_inside, other=0.0)
    weights = tl.load(column_weight + column_index, mask=column_inside, other=0.0)
    g += tl.exp2((logits + powers[None, :]) * LOG2_E) * weights[None, :]
    g = _store_gradient(
        g, row_index, column_index, row_ids, column_ids, positives, gradient, row_count,
        column_count, row_offset, smoothing, pair_count, gain, HAS_IDS, HAS_TARGETS,
    )  # fmt: skip
    return g, products


@triton.jit
def gradient_kernel(
    rows,
    columns,
    scale,
    row_power,
    row_weight,
    column_power,
    column_weight,
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
    pair_count,
    gain,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """A tile of G by recomputing S, and its Σ G·(I·Tᵀ)."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    row_index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    g, products = _gradient_tile(
        rows, columns, scale, row_power, row_weight, column_power, column_weight, row_ids,
        column_ids, positives, gradient, row_index, column_index, row_count, column_count,
        dims, row_stride, column_stride, row_offset, smoothing, pair_count, gain, BLOCK_M, BLOCK_N,
        BLOCK_K, EVEN_K, HAS_IDS, HAS_TARGETS,
    )  # fmt: skip
    place = tile_m * tl.num_programs(1) + tile_n
    tl.store(scale_partial + place, tl.sum(tl.sum(g * products, axis=1)))


@triton.jit
def regradient_kernel(
    rows,
    columns,
    scale,
    row_power,
    row_weight,
    column_power,
    column_weight,
    row_norm,
    column_norm,
    row_ids,
    column_ids,
    positives,
    gradient,
    row_count,
    column_count,
    dims,
    row_stride,
    column_stride,
    row_offset,
    smoothing,
    pair_count,
    gain,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    TILES: tl.constexpr,
):
    """What `rescale_kernel` could not take from kept exponentials, recomputed."""
    strip, first_tile = tl.program_id(0), tl.program_id(1) * TILES
    tiles_n = tl.cdiv(column_count, BLOCK_N)
    s = tl.load(scale)
    for tile_n in range(first_tile, tl.minimum(first_tile + TILES, tiles_n)):
        tile_rows = strip * BLOCK_R // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
        row_index = strip * BLOCK_R + tl.arange(0, BLOCK_R)
        column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        shift = _shift(row_norm, column_norm, tile_rows, column_index, row_count, column_count, s)
        low = float("-inf")
        of_row = tl.load(row_power + row_index, mask=row_index < row_count, other=low)
        of_column = tl.load(
            column_power + column_index, mask=column_index < column_count, other=low
        )
        highest = tl.maximum(tl.max(of_row), tl.max(of_column))
        if (highest + shift <= -FLOOR) == 0:  # NaN counts as too small
            _gradient_tile(
                rows, columns, scale, row_power, row_weight, column_power, column_weight, row_ids,
                column_ids, positives, gradient, row_index, column_index, row_count, column_count,
                dims, row_stride, column_stride, row_offset, smoothing, pair_count, gain, BLOCK_R,
                BLOCK_N, BLOCK_K, EVEN_K, HAS_IDS, HAS_TARGETS,
            )  # fmt: skip


@triton.jit
def _factor(power, weight, shift):
    """e^(shift + power)·weight. Whole powers of e apart, so that no digits are lost near e^±80."""
    total = shift + power
    lost = (shift - (total - (total - shift))) + (power - (total - shift))
    whole = tl.floor(total)
    rest = whole * LOG2_E_LOW + ((total - whole) + lost) * LOG2_E
    return tl.exp2(whole * LOG2_E_HIGH) * tl.exp2(rest) * weight


@triton.jit
def rescale_kernel(
    exponentials,
    scale,
    row_power,
    row_weight,
    column_power,
    column_weight,
    row_norm,
    column_norm,
    row_ids,
    column_ids,
    positives,
    gradient,
    row_count,
    column_count,
    row_offset,
    smoothing,
    pair_count,
    gain,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """BLOCK_R rows of a tile of G from kept exponentials; bound by memory."""
    strip, tile_n = tl.program_id(0), tl.program_id(1)
    tile_rows = strip * BLOCK_R // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
    row_index = strip * BLOCK_R + tl.arange(0, BLOCK_R)
    column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.load(scale)
    shift = _shift(row_norm, column_norm, tile_rows, column_index, row_count, column_count, s)
    row_inside, column_inside = row_index < row_count, column_index < column_count
    place = row_index.to(tl.int64)[:, None] * column_count + column_index[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    e = tl.load(exponentials + place, mask=inside, other=0.0).to(tl.float32)
    row_factor = _factor(
        tl.load(row_power + row_index, mask=row_inside, other=0.0),
        tl.load(row_weight + row_index, mask=row_inside, other=0.0),
        shift,
    )
    column_factor = _factor(
        tl.load(column_power + column_index, mask=column_inside, other=0.0),
        tl.load(column_weight + column_index, mask=column_inside, other=0.0),
        shift,
    )
    _store_gradient(
        e * (row_factor[:, None] + column_factor[None, :]), row_index, column_index, row_ids,
        column_ids, positives, gradient, row_count, column_count, row_offset, smoothing,
        pair_count, gain, HAS_IDS, HAS_TARGETS,
    )  # fmt: skip
