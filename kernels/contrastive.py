"""The softmax contrastive loss's two passes over S in Triton; see `fastclip.kernels.reference`.

Each program computes one tile of the similarity matrix and leaves partial results: sums of
exponentials per row and per column of the tile in the first pass, the tile of G and its part of
the scale's gradient in the second. Small kernels add the partial results up in a fixed order, so
that the outcome does not depend on scheduling; there are no atomics. The products G·T and Gᵀ·I are
matrix multiplications of the library's. Blocks bound what is held: neither S nor G is whole.

**One exponential per entry** makes both sums of the first pass. |S_ij| ≤ b = |s|·max‖I_i‖·max‖T_j‖
over a tile, so E = e^(S − shift) with a shift of max(0, ⌊b⌋ − 70) cannot overflow, and no maximum
is needed. What lies 87 or more below the shift is flushed to zero; that is nothing to a sum of
e^−50 or more. A tile where a row's or a column's sum is smaller is done once more, relative to its
true maxima. This is decided on the device, tile by tile: no input under- or overflows, and the host
never waits.

**Kept exponentials.** E has the exponent range of bf16. Within a memory budget the first pass keeps
it, and the second multiplies it by e^(shift − O_i)·q_i + e^(shift − O_j)·q_j, O being the others'
log-sum-exp and q their share, instead of computing S again. Where an O lies too far below the
tile's shift for E to hold what counts, the tile of G is recomputed after all. The scale's gradient
is then Σ I·(G·T), since S is not at hand.

No multiplication is fused with an addition: S − max S would then keep what S lost to rounding, and
at |S| = 1e30 that is no small number.

**Own pairs** are kept out of G, whose low-precision entries cannot hold p_ii − 1 where p_ii is
close to 1, and added in fp32 (`fastclip.kernels.pairs`).
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from fastclip.kernels.contrastive_kernels import (
    gradient_kernel,
    regradient_kernel,
    repair_kernel,
    rescale_kernel,
    statistics_kernel,
)
from fastclip.kernels.contrastive_sums import (
    dot_kernel,
    merge_kernel,
    scale_kernel,
    summary_kernel,
)
from fastclip.kernels.reference import (
    ContrastiveProducts,
    ContrastiveStatistics,
    ContrastiveSummary,
    positives_of,
)
from fastclip.kernels.tiling import (
    BLOCK_ELEMENTS,
    Block,
    ProductsWithG,
    Tiling,
    blocks,
    capability_of,
    gain_of,
    operands,
    tiling,
)

REPAIR_TILES = 16
"""Tiles that one program of a repair looks through."""

SUMMARY_COLUMNS = 256
"""Of one program: its double precision is what takes time, on many multiprocessors less."""

DOT_ROWS = 16
"""Rows of a program that sums dot products."""

RESCALED_ROWS = 32
"""Rows of a tile that one program rescales: it has no operands to share, only registers to save."""


def kept_elements(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    memory_budget: int,
    block_elements: int = BLOCK_ELEMENTS,
) -> int:
    """Exponentials of the first whole blocks that fit into the budget (bytes).

    None for fp16 operands: their own rounding is finer than that of bf16, and fp16 has too few
    exponents for exponentials.
    """
    if dtype == torch.float16:
        return 0
    kept = 0
    for block in blocks(rows, columns, block_elements):
        size = math.prod(block.shape)
        if (kept + size) * dtype.itemsize > memory_budget:
            break
        kept += size
    return kept


def contrastive_statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    product: Tensor,
    row_norm: Tensor,
    column_norm: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    positives: Tensor | None = None,
    pair_count: int | None = None,
    label_smoothing: float = 0.0,
    memory_budget: int = 0,
    block_elements: int = BLOCK_ELEMENTS,
) -> ContrastiveStatistics:
    """First pass; arguments and results are `reference.contrastive_statistics`'s (no fp64)."""
    rows, columns, scale = operands(rows, columns, scale)
    total, count, dims = rows.shape[0], columns.shape[0], rows.shape[1]
    pairs = pair_count or count
    has_gap = row_ids is not None or label_smoothing > 0
    others_of_row = product.new_empty(total, dtype=torch.float64)
    others_of_column = product.new_empty(count, dtype=torch.float64)
    gap = product.new_zeros(total)
    if total == 0 or count == 0:  # no block will come
        others_of_row.fill_(float("-inf"))
        others_of_column.fill_(float("-inf"))
    positives = _positives(row_ids, column_ids, positives)
    tile = tiling(rows.dtype, capability_of(rows))
    kept = kept_elements(total, count, rows.dtype, memory_budget, block_elements)
    exponentials = rows.new_empty(kept)
    options = _gemm_options(tile, dims)
    held = 0
    for block in blocks(total, count, block_elements):
        height, width = block.shape
        tiles = triton.cdiv(height, tile.block_m), triton.cdiv(width, tile.block_n)
        chunk, others = rows[block.rows], columns[block.columns]
        shape = (height, width, dims, chunk.stride(0), others.stride(0), _offset(row_offset, block))
        row_partial = product.new_empty((2, tiles[1], height))
        column_partial = product.new_empty((2, tiles[0], width))
        gap_partial = product.new_empty((tiles[1], height)) if has_gap else product
        keep = held + height * width <= kept
        statistics_kernel[tiles](
            chunk, others, scale, product[block.rows], row_norm[block.rows],
            column_norm[block.columns], *_ids(row_ids, column_ids, positives, block, product),
            *row_partial, *column_partial, gap_partial, exponentials[held:] if keep else rows,
            *shape, label_smoothing, pairs,
            HAS_IDS=row_ids is not None, HAS_GAP=has_gap, KEEP=keep, **options,
        )  # fmt: skip
        repair_kernel[(tiles[0], triton.cdiv(tiles[1], REPAIR_TILES))](
            chunk, others, scale, *row_partial, *column_partial, *shape,
            TILES=REPAIR_TILES, **options,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(height, 128) + triton.cdiv(width, 128),)](
            *row_partial, *column_partial, others_of_row[block.rows],
            others_of_column[block.columns], height, width, *tiles,
            ADD_ROWS=not block.first_of_rows, ADD_COLUMNS=not block.first_of_columns,
            BLOCK=128, TILES=16, num_warps=4,
        )  # fmt: skip
        if has_gap:
            gap[block.rows] += gap_partial.sum(0)
        held += height * width
    return ContrastiveStatistics(others_of_row, others_of_column, gap, exponentials)


def contrastive_summary(
    others_of_row: Tensor,
    others_of_column: Tensor,
    product_of_column: Tensor,
    scale: Tensor,
    gap: Tensor,
    own_target: Tensor | None,
    *,
    row_offset: int = 0,
    pair_count: int | None = None,
) -> ContrastiveSummary:
    """Between the passes; `reference.contrastive_summary` (no fp64)."""
    rows, count = others_of_row.shape[0], others_of_column.shape[0]
    own_entry, programs = gap.new_empty(rows), triton.cdiv(count, SUMMARY_COLUMNS)
    partial = gap.new_empty(programs, dtype=torch.float64)
    row_terms, column_terms = gap.new_empty((2, rows)), gap.new_empty((2, count))
    summary_kernel[(programs,)](
        others_of_row, others_of_column, product_of_column, scale.float().reshape(()), gap,
        gap if own_target is None else own_target,
        partial, *row_terms, *column_terms, own_entry, rows, count, row_offset,
        pair_count or count,
        HAS_TARGET=own_target is not None, BLOCK=SUMMARY_COLUMNS, num_warps=4,
    )  # fmt: skip
    return ContrastiveSummary(partial.sum().float(), row_terms, column_terms, own_entry)


def contrastive_products(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    product: Tensor,
    row_norm: Tensor,
    column_norm: Tensor,
    row_terms: Tensor,
    column_terms: Tensor,
    own_entry: Tensor,
    exponentials: Tensor,
    upstream: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    positives: Tensor | None = None,
    pair_count: int | None = None,
    label_smoothing: float = 0.0,
    need_rows: bool = True,
    need_columns: bool = True,
    block_elements: int = BLOCK_ELEMENTS,
) -> ContrastiveProducts:
    """Second pass; arguments and results are `reference.contrastive_products`'s (no fp64)."""
    rows, columns, scale, upstream = operands(rows, columns, scale, upstream)
    total, count, dims = rows.shape[0], columns.shape[0], rows.shape[1]
    tile = tiling(rows.dtype, capability_of(rows))
    options = _gemm_options(tile, dims)
    narrow = tiling(rows.dtype, capability_of(rows), narrow=True)
    targets = {
        "HAS_IDS": row_ids is not None,
        "HAS_TARGETS": row_ids is not None or label_smoothing > 0,
    }
    pairs, gain = pair_count or count, gain_of(rows.dtype)
    positives = _positives(row_ids, column_ids, positives)
    strip = min(RESCALED_ROWS, tile.block_m)
    kept = exponentials.numel()
    # S is not at hand where E was kept: the scale's gradient then comes from a tower's products.
    rows_too = need_rows or (kept > 0 and not need_columns)
    products = ProductsWithG(rows, columns, rows_too, need_columns, gain)
    of_scale: list[Tensor] = []
    held = 0
    for block in blocks(total, count, block_elements):
        height, width = block.shape
        tiles = triton.cdiv(height, tile.block_m), triton.cdiv(width, tile.block_n)
        chunk, others = rows[block.rows], columns[block.columns]
        offset = _offset(row_offset, block)
        shape = (height, width, dims, chunk.stride(0), others.stride(0), offset)
        gradient = rows.new_empty((height, width))
        terms = (*row_terms[:, block.rows], *column_terms[:, block.columns])
        norms = (row_norm[block.rows], column_norm[block.columns])
        ids = _ids(row_ids, column_ids, positives, block, product)
        if held + height * width <= kept:
            strips = tiles[0] * (tile.block_m // strip)
            rescale_kernel[(strips, tiles[1])](
                exponentials[held:], scale, *terms, *norms, *ids, gradient,
                height, width, offset, label_smoothing, pairs, gain,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=strip,
                num_warps=tile.warps, enable_fp_fusion=False, **targets,
            )  # fmt: skip
            regradient_kernel[(strips, triton.cdiv(tiles[1], REPAIR_TILES))](
                chunk, others, scale, *terms, *norms, *ids, gradient, *shape,
                label_smoothing, pairs, gain,
                BLOCK_R=strip, TILES=REPAIR_TILES, **options, **targets,
            )  # fmt: skip
        else:
            tiles = triton.cdiv(height, narrow.block_m), triton.cdiv(width, narrow.block_n)
            of_tiles = product.new_empty(tiles[0] * tiles[1])
            gradient_kernel[tiles](
                chunk, others, scale, *terms, *ids, gradient, of_tiles, *shape,
                label_smoothing, pairs, gain, **_gemm_options(narrow, dims), **targets,
            )  # fmt: skip
            of_scale.append(of_tiles)
            if total * count > height * width:  # many blocks have too many tiles for one program
                of_scale[-1] = of_tiles.sum(dtype=torch.float64, dim=0, keepdim=True)
        products.add(gradient, block)
        del gradient  # or the next block would be made beside it
        held += height * width
    of_rows, of_columns = products.finish()
    if kept and of_rows is not None:
        partial = _dots(rows, of_rows)
    elif kept and of_columns is not None:
        partial = _dots(columns, of_columns)
    else:
        partial = product.new_empty(0)
        if of_scale:
            partial = torch.cat(of_scale) if len(of_scale) > 1 else of_scale[0]
    d_scale = product.new_empty(())
    scale_kernel[(1,)](
        partial, own_entry, product, upstream, d_scale, partial.numel(), total, 0.5 / pairs,
        BLOCK=1024, num_warps=8,
    )  # fmt: skip
    return ContrastiveProducts(of_rows if need_rows else None, of_columns, d_scale)


def _dots(features: Tensor, products: Tensor) -> Tensor:
    """Parts of Σ G·(I·Tᵀ), from one tower and its products."""
    count, dims = features.shape
    parts = products.new_empty(triton.cdiv(count, DOT_ROWS))
    dot_kernel[(parts.shape[0],)](
        features, products, parts, count, dims, features.stride(0),
        BLOCK_B=DOT_ROWS, BLOCK_D=256, num_warps=4,
    )  # fmt: skip
    return parts


def _positives(
    row_ids: Tensor | None, column_ids: Tensor | None, positives: Tensor | None
) -> Tensor | None:
    if positives is not None or row_ids is None or column_ids is None:
        return positives
    return positives_of(row_ids, column_ids)


def _ids(
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    positives: Tensor | None,
    block: Block,
    unused: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' three pointers; anything where there are no ids, since they are not read."""
    if row_ids is None or column_ids is None or positives is None:
        return unused, unused, unused
    return (
        row_ids[block.rows].contiguous(),
        column_ids[block.columns].contiguous(),
        positives[block.rows],
    )


def _offset(row_offset: int, block: Block) -> int:
    """Index of the block's first row's own column among the block's columns."""
    return row_offset + block.rows.start - block.columns.start


def _gemm_options(tile: Tiling, dims: int) -> dict[str, int | bool]:
    """What every kernel with a product is launched with."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "EVEN_K": dims % tile.block_k == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": False,
    }
