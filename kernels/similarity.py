"""Normalised similarity in Triton, whole or its k largest; see `reference_similarity`.

Norms are computed once per feature, in a pass of O((M + N)·D), and divided out of each tile's
products in fp32: normalised features are never stored.

The k largest, k ≤ 64: each program multiplies a block of queries with one stretch of the keys, tile
after tile, and keeps the best k so far in registers. From a tile it takes, row by row, the largest
entry as long as that one beats the worst kept, so that after the first tiles, which fill the list,
hardly anything but the tile's maxima is computed (k·ln N entries of a row are ever taken when keys
come in no particular order; never more than k from one tile). A second kernel merges the stretches'
lists by sorting networks. Larger k are selected by that same kernel from a chunk's similarities:
from stretches of each row, so that few queries fill the device too, and then from their lists.

Score and index are one int64, score above, index reversed below: all entries differ, so that the
result does not depend on tile sizes, the number of stretches or scheduling.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.reference import NORM_FLOOR
from fastclip.kernels.reference_similarity import (
    Neighbours,
    SimilarityGradients,
    gradients_by,
)
from fastclip.kernels.tiling import (
    Tiling,
    capability_of,
    matmul_fp32,
    operands,
    similarity_tile,
    tiling,
)

CHUNK_ELEMENTS = 1 << 28
"""Similarities held at a time where k is large, and weights in the gradient (1 GiB in fp32)."""

STREAMED_K = 64
"""Largest k whose list is kept in registers."""

_NORM_FLOOR = tl.constexpr(NORM_FLOOR)
_INT32_MIN = tl.constexpr(-(2**31))
_INT32_MAX = tl.constexpr(2**31 - 1)
_NOTHING = tl.constexpr(-(2**63))
"""Below every entry."""

_UNBEATEN = tl.constexpr(2**63 - 1)
"""Above every entry."""


@triton.jit
def norm_kernel(
    features,
    norms,
    row_count,
    dims,
    row_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """max(‖x‖, 1e-12) of each row, fp32."""
    row_index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    pointer = features + row_index.to(tl.int64)[:, None] * row_stride + k[None, :]
    inside = row_index[:, None] < row_count
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for first in range(0, dims, BLOCK_K):
        mask = inside & (k[None, :] < dims - first)
        x = tl.load(pointer + first, mask=mask, other=0.0).to(tl.float32)
        total += x * x
    norm = tl.sqrt_rn(tl.sum(total, axis=1))
    tl.store(norms + row_index, tl.maximum(norm, _NORM_FLOOR), mask=row_index < row_count)


@triton.jit
def _scores_tile(
    queries,
    keys,
    query_norms,
    key_norms,
    row_index,
    column_index,
    query_count,
    key_count,
    row_stride,
    column_stride,
    dims,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Products of a tile, divided by both norms."""
    scores = similarity_tile(
        queries, keys, row_index, column_index, query_count, key_count, row_stride, column_stride,
        dims, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    if NORMALIZE:
        rows = tl.load(query_norms + row_index, mask=row_index < query_count, other=1.0)
        columns = tl.load(key_norms + column_index, mask=column_index < key_count, other=1.0)
        # Reciprocals of vectors, not divisions of a tile.
        scores = scores * (1.0 / rows)[:, None] * (1.0 / columns)[None, :]
    return scores


@triton.jit
def _sortable(scores):
    """fp32 as int32 of the same order: −0 as 0, every NaN the greatest."""
    bits = scores.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, (bits ^ _INT32_MAX) + 1, bits)
    return tl.where((bits & _INT32_MAX) > 0x7F800000, _INT32_MAX, order)


@triton.jit
def _entry(order, index):
    """Score above, index below: of equal scores, the lower index is the greater entry."""
    return (order.to(tl.int64) << 32) | (index ^ _INT32_MAX).to(tl.int64)


@triton.jit
def similarity_kernel(
    queries,
    keys,
    query_norms,
    key_norms,
    scale,
    result,
    query_count,
    key_count,
    row_stride,
    column_stride,
    dims,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of similarities."""
    tiles_m, tiles_n = tl.cdiv(query_count, BLOCK_M), tl.cdiv(key_count, BLOCK_N)
    # A grid of one axis: the others end at 65,535. Neighbours share tiles of keys in the L2 cache.
    program = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(program // tiles_n, program % tiles_n, tiles_m, tiles_n, GROUP)
    row_index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = _scores_tile(
        queries, keys, query_norms, key_norms, row_index, column_index, query_count, key_count,
        row_stride, column_stride, dims, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, NORMALIZE,
    )  # fmt: skip
    scores *= tl.load(scale)
    place = row_index.to(tl.int64)[:, None] * key_count + column_index[None, :]
    inside = (row_index[:, None] < query_count) & (column_index[None, :] < key_count)
    tl.store(result + place, scores.to(result.dtype.element_ty), mask=inside)


@triton.jit
def topk_kernel(
    queries,
    keys,
    query_norms,
    key_norms,
    lists,
    query_count,
    key_count,
    row_stride,
    column_stride,
    dims,
    k,
    tiles_per_stretch,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """The k largest entries, in no order, of a block of queries and one stretch of the keys.

    `lists` is [queries, stretches, K]; places from k on hold nothing.
    """
    tile_m, stretch = tl.program_id(0), tl.program_id(1)
    row_index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.arange(0, K).to(tl.int64)
    # Different from each other, so that an entry replaces one place only.
    start = tl.where(slot < k, slot + _NOTHING, slot ^ _UNBEATEN)
    best = tl.zeros((BLOCK_M, K), dtype=tl.int64) + start[None, :]
    first_tile = stretch * tiles_per_stretch
    last_tile = tl.minimum(first_tile + tiles_per_stretch, tl.cdiv(key_count, BLOCK_N))
    for tile_n in range(first_tile, last_tile):
        column_index = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        scores = _scores_tile(
            queries, keys, query_norms, key_norms, row_index, column_index, query_count, key_count,
            row_stride, column_stride, dims, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, NORMALIZE,
        )  # fmt: skip
        order = tl.where(column_index[None, :] < key_count, _sortable(scores), _INT32_MIN)
        largest = tl.max(order, axis=1)
        worst = tl.min(best, axis=1)
        # Keys come by ascending index: an equal score is behind those that are kept.
        beats = largest > (worst >> 32).to(tl.int32)
        while tl.max(beats.to(tl.int32), axis=0) != 0:
            here = order == largest[:, None]
            column = tl.min(tl.where(here, column_index[None, :], _INT32_MAX), axis=1)
            taken = (best == worst[:, None]) & beats[:, None]
            best = tl.where(taken, _entry(largest, column)[:, None], best)
            order = tl.where(column_index[None, :] == column[:, None], _INT32_MIN, order)
            largest = tl.max(order, axis=1)
            worst = tl.min(best, axis=1)
            beats = largest > (worst >> 32).to(tl.int32)
    best = tl.where(slot[None, :] < k, best, _NOTHING)
    row_place = row_index.to(tl.int64) * tl.num_programs(1) + stretch
    place = row_place[:, None] * K + slot[None, :]
    tl.store(lists + place, best, mask=row_index[:, None] < query_count)


@triton.jit
def select_kernel(
    source,
    lists,
    values,
    indices,
    query_count,
    width,
    k,
    blocks_per_stretch,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FROM_SCORES: tl.constexpr,
    TO_LISTS: tl.constexpr,
):
    """Each row's k largest of a stretch of entries (or scores, whose index is their place).

    The result falls: values and indices, or, of several stretches, entries in `lists`
    [queries, stretches, k], whose last places hold nothing where a stretch has fewer than k.
    """
    row_index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    stretch = tl.program_id(1)
    slot = tl.arange(0, K)
    row_place = row_index.to(tl.int64)[:, None] * width
    row_inside = row_index[:, None] < query_count
    first_block = stretch * blocks_per_stretch
    # Not tl.cdiv, whose sum with K may be no int32.
    last_block = tl.minimum(first_block + blocks_per_stretch, (width - 1) // K + 1)
    best = tl.full((BLOCK_M, K), _NOTHING, dtype=tl.int64)
    for number in range(first_block, last_block):
        index = number * K + slot[None, :]
        inside = row_inside & (index < width)
        if FROM_SCORES:
            scores = tl.load(source + row_place + index, mask=inside, other=0.0)
            block = tl.where(inside, _entry(_sortable(scores), index), _NOTHING)
        else:
            block = tl.load(source + row_place + index, mask=inside, other=_NOTHING)
        # One list falling and one rising: their pairwise maximum is the K largest of both, and
        # bitonic.
        best = tl.maximum(best, tl.sort(block, descending=False))
        best = tl.bitonic_merge(best, descending=True)
    wanted = row_inside & (slot[None, :] < k)
    if TO_LISTS:
        list_place = row_index.to(tl.int64) * tl.num_programs(1) + stretch
        tl.store(lists + list_place[:, None] * k + slot[None, :], best, mask=wanted)
    else:
        order = (best >> 32).to(tl.int32)
        value = tl.where(order < 0, (order ^ _INT32_MAX) + 1, order).to(tl.float32, bitcast=True)
        place = row_index.to(tl.int64)[:, None] * k + slot[None, :]
        tl.store(values + place, value, mask=wanted)
        tl.store(indices + place, (best & _INT32_MAX) ^ _INT32_MAX, mask=wanted)


# Smaller than the losses' tiles: the list and the tile's order stay in registers together.
_HALF = {
    80: Tiling(128, 64, 32, 8, 3),
    90: Tiling(128, 64, 64, 8, 3),
    100: Tiling(64, 128, 64, 8, 3),
}
_SINGLE = Tiling(64, 64, 16, 8, 3)
# From sm_90 on the compiler would rather spill than give the larger tile more than 128 registers.
_SINGLE_SHORT = Tiling(64, 32, 32, 8, 3)

SELECT_ENTRIES = 2048
"""Entries that a program of `select_kernel` sorts at a time."""

SELECT_WARPS = 8

NORM_BLOCK = (16, 128)
"""Rows and dims that a program of `norm_kernel` holds at a time."""


def topk_tiling(dtype: torch.dtype, slots: int, capability: int | None) -> Tiling:
    """Configuration of `topk_kernel` for lists of `slots` places; None is the interpreter."""
    if capability is None:
        return tiling(dtype, capability)
    if dtype == torch.float32:
        return _SINGLE_SHORT if capability >= 90 and slots <= 32 else _SINGLE
    return _HALF[max((number for number in _HALF if number <= capability), default=80)]


def slots_for(k: int) -> int:
    """Places of a list that holds k entries: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(k))


def norms(features: Tensor) -> Tensor:
    """max(‖x‖, 1e-12) of each row, fp32 [rows]."""
    rows, dims = features.shape
    result = features.new_empty(rows, dtype=torch.float32)
    if rows:
        block_m, block_k = NORM_BLOCK
        norm_kernel[(triton.cdiv(rows, block_m),)](
            features, result, rows, dims, features.stride(0),
            BLOCK_M=block_m, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return result


def similarity(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    normalize: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Arguments and result are `reference_similarity.similarity`'s (no fp64)."""
    queries, keys, scale = operands(queries, keys, scale)
    result = queries.new_empty((queries.shape[0], keys.shape[0]), dtype=out_dtype)
    _write_similarity(queries, keys, scale, _both_norms(queries, keys, normalize), result)
    return result


def similarity_gradients(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    normalize: bool,
    need_queries: bool = True,
    need_keys: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> SimilarityGradients:
    """As `reference_similarity.similarity_gradients`, with products in the features' dtype."""
    queries, keys, scale = operands(queries, keys, scale)
    return gradients_by(
        _product,
        gradient,
        queries,
        keys,
        scale,
        _both_norms(queries, keys, normalize),
        need_queries,
        need_keys,
        chunk_elements,
    )


def similarity_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    normalize: bool,
    stretches: int | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Neighbours:
    """Arguments and result are `reference_similarity.similarity_topk`'s (no fp64).

    Args:
        stretches: into how many the keys are cut; None: as many as the device needs.
        chunk_elements: similarities held at a time where k is large.
    """
    queries, keys = operands(queries, keys)
    both_norms = _both_norms(queries, keys, normalize)
    result = Neighbours(
        queries.new_empty((queries.shape[0], k), dtype=torch.float32),
        queries.new_empty((queries.shape[0], k), dtype=torch.int64),
    )
    if k <= STREAMED_K:
        lists = _stretch_lists(queries, keys, k, both_norms, stretches)
        select(lists, k, result)
        return result
    one = queries.new_ones((), dtype=torch.float32)
    size = max(1, chunk_elements // keys.shape[0])
    for first in range(0, queries.shape[0], size):
        chunk = slice(first, first + size)
        rows = queries[chunk]
        scores = rows.new_empty((rows.shape[0], keys.shape[0]), dtype=torch.float32)
        part = None if both_norms is None else (both_norms[0][chunk], both_norms[1])
        _write_similarity(rows, keys, one, part, scores)
        select(scores, k, Neighbours(*(x[chunk] for x in result)), stretches)
        del scores  # the name would keep it while the next chunk is allocated
    return result


def select(source: Tensor, k: int, result: Neighbours, stretches: int | None = None) -> None:
    """Write each row's k largest to `result`, in the order of `reference_similarity`.

    Args:
        source: [M, width], scores in fp32, whose index is their place, or entries in int64.
        k: at most `width`.
        result: [M, k] each.
        stretches: into how many the width is cut, each selected from by a program of its own
            before a second pass selects from them all; None: as many as the device needs.
    """
    rows, width = source.shape
    if rows == 0:
        return
    blocks = triton.cdiv(width, slots_for(k))
    if stretches is None:
        stretches = select_stretches(rows, width, k, multiprocessors(source.device))
    per_stretch = triton.cdiv(blocks, min(stretches, blocks))
    stretches = triton.cdiv(blocks, per_stretch)
    if stretches > 1:
        # Entries carry their index, and all differ: from which list one is taken does not matter.
        lists = source.new_empty((rows, stretches * k), dtype=torch.int64)
        _select(source, k, lists, result, stretches, per_stretch)
        source, blocks = lists, triton.cdiv(lists.shape[1], slots_for(k))
    _select(source, k, source, result, 1, blocks)


def _select(
    source: Tensor, k: int, lists: Tensor, result: Neighbours, stretches: int, per_stretch: int
) -> None:
    """One pass of `select_kernel`; of several stretches it writes the lists, of one the result."""
    rows, width = source.shape
    slots = slots_for(k)
    block_m = SELECT_ENTRIES // slots
    select_kernel[(triton.cdiv(rows, block_m), stretches)](
        source, lists, *result, rows, width, k, per_stretch,
        K=slots, BLOCK_M=block_m, FROM_SCORES=source.dtype == torch.float32,
        TO_LISTS=stretches > 1, num_warps=SELECT_WARPS,
    )  # fmt: skip


def select_stretches(rows: int, width: int, k: int, processors: int) -> int:
    """Enough stretches of `width` for four programs of `select_kernel` on each multiprocessor.

    Of no fewer than eight blocks each, and no more than the square root of a row's blocks: the
    second pass goes through one after the other. The more rows, the fewer stretches: all lists hold
    no more than 8·processors·`SELECT_ENTRIES` entries (17 MB on 132 multiprocessors).
    """
    slots = slots_for(k)
    blocks = triton.cdiv(width, slots)
    wanted = triton.cdiv(4 * processors, triton.cdiv(rows, SELECT_ENTRIES // slots))
    return max(1, min(wanted, blocks // 8, math.isqrt(blocks)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a CUDA device has; the interpreter none."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _both_norms(queries: Tensor, keys: Tensor, normalize: bool) -> tuple[Tensor, Tensor] | None:
    return (norms(queries), norms(keys)) if normalize else None


def _write_similarity(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    both_norms: tuple[Tensor, Tensor] | None,
    result: Tensor,
) -> None:
    (rows, dims), columns = queries.shape, keys.shape[0]
    tile = tiling(queries.dtype, capability_of(queries))
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    if programs == 0:
        return
    # The norms' pointers are not read without normalisation.
    similarity_kernel[(programs,)](
        queries, keys, *(both_norms or (scale, scale)), scale, result,
        rows, columns, queries.stride(0), keys.stride(0), dims,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        EVEN_K=dims % tile.block_k == 0, NORMALIZE=both_norms is not None, GROUP=8,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _stretch_lists(
    queries: Tensor,
    keys: Tensor,
    k: int,
    both_norms: tuple[Tensor, Tensor] | None,
    stretches: int | None,
) -> Tensor:
    """Lists of every stretch, int64 [M, stretches·slots]."""
    (rows, dims), columns = queries.shape, keys.shape[0]
    slots = slots_for(k)
    tile = topk_tiling(queries.dtype, slots, capability_of(queries))
    tiles_m, tiles_n = triton.cdiv(rows, tile.block_m), triton.cdiv(columns, tile.block_n)
    if stretches is None:
        stretches = _stretches(tiles_m, tiles_n, multiprocessors(queries.device))
    per_stretch = triton.cdiv(tiles_n, min(stretches, tiles_n))
    grid = (tiles_m, triton.cdiv(tiles_n, per_stretch))
    lists = queries.new_empty((rows, grid[1] * slots), dtype=torch.int64)
    if rows:
        topk_kernel[grid](
            queries, keys, *(both_norms or (queries, queries)), lists,
            rows, columns, queries.stride(0), keys.stride(0), dims, k, per_stretch,
            K=slots, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            EVEN_K=dims % tile.block_k == 0, NORMALIZE=both_norms is not None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return lists


def _stretches(tiles_m: int, tiles_n: int, processors: int) -> int:
    """Enough stretches for two programs on each multiprocessor, of no fewer than four tiles each.

    Each stretch fills its list anew, which costs as much as many tiles later on.
    """
    return max(1, min(triton.cdiv(2 * processors, max(tiles_m, 1)), tiles_n // 4))


def _product(weights: Tensor, features: Tensor) -> Tensor:
    """weights [a, b] in fp32 @ features [b, D], fp32."""
    if features.dtype != torch.float16:
        return matmul_fp32(weights.to(features.dtype), features)
    # fp16 holds neither small nor large weights: each row is brought to 1. A row of zeros among the
    # features has a weight of up to 1e12, and would push all others below what fp16 can hold. (Not
    # filled with zeros: a NaN stays one.)
    weights = weights * (features != 0).any(1)
    gain = weights.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return matmul_fp32((weights / gain).half(), features).mul_(gain)
