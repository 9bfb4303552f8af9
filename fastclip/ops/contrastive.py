"""The softmax loss's passes as operators; meaning and arguments are the reference's.

What is not asked for comes back empty ([0]), since an operator's results are tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.kernels.reference import compute_dtype
from fastclip.ops.dispatch import choose, contrastive_module


@torch.library.custom_op("fastclip::contrastive_statistics", mutates_args=())
def contrastive_statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    product: Tensor,
    row_norm: Tensor,
    column_norm: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    positives: Tensor | None,
    pair_count: int,
    row_offset: int,
    label_smoothing: float,
    memory_budget: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(others_of_row fp64 [b], others_of_column fp64 [n], gap [b], exponentials [c])."""
    with torch.cuda.device_of(rows):
        statistics = contrastive_module(impl, rows).contrastive_statistics(
            rows,
            columns,
            scale,
            product,
            row_norm,
            column_norm,
            row_offset=row_offset,
            row_ids=row_ids,
            column_ids=column_ids,
            positives=positives,
            pair_count=pair_count,
            label_smoothing=label_smoothing,
            memory_budget=memory_budget,
        )
    return tuple(statistics)


@contrastive_statistics.register_fake
def _(
    rows, columns, scale, product, row_norm, column_norm, row_ids, column_ids, positives,
    pair_count, row_offset, label_smoothing, memory_budget, impl,
):  # fmt: skip
    del scale, row_norm, column_norm, row_ids, column_ids, positives, pair_count, row_offset
    del label_smoothing
    b, n = rows.shape[0], columns.shape[0]
    kept = 0
    if choose(impl, rows) == "triton":
        from fastclip.kernels.contrastive import kept_elements

        kept = kept_elements(b, n, rows.dtype, memory_budget)
    return (
        rows.new_empty(b, dtype=torch.float64),
        rows.new_empty(n, dtype=torch.float64),
        product.new_empty(b),
        rows.new_empty(kept),
    )


@torch.library.custom_op("fastclip::contrastive_summary", mutates_args=())
def contrastive_summary(
    others_of_row: Tensor,
    others_of_column: Tensor,
    product_of_column: Tensor,
    scale: Tensor,
    gap: Tensor,
    own_target: Tensor | None,
    pair_count: int,
    row_offset: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], row_terms [2, b], column_terms [2, n], own_entry [b])."""
    with torch.cuda.device_of(gap):
        summary = contrastive_module(impl, gap).contrastive_summary(
            others_of_row,
            others_of_column,
            product_of_column,
            scale,
            gap,
            own_target,
            row_offset=row_offset,
            pair_count=pair_count,
        )
    return tuple(summary)


@contrastive_summary.register_fake
def _(
    others_of_row, others_of_column, product_of_column, scale, gap, own_target, pair_count,
    row_offset, impl,
):  # fmt: skip
    del product_of_column, scale, own_target, pair_count, row_offset, impl
    b, n = others_of_row.shape[0], others_of_column.shape[0]
    return gap.new_empty(()), gap.new_empty((2, b)), gap.new_empty((2, n)), gap.new_empty(b)


@torch.library.custom_op("fastclip::contrastive_products", mutates_args=())
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
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    positives: Tensor | None,
    pair_count: int,
    row_offset: int,
    label_smoothing: float,
    need_rows: bool,
    need_columns: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_products [b, D] or [0], column_products [n, D] or [0], d_scale [])."""
    with torch.cuda.device_of(rows):
        products = contrastive_module(impl, rows).contrastive_products(
            rows,
            columns,
            scale,
            product,
            row_norm,
            column_norm,
            row_terms,
            column_terms,
            own_entry,
            exponentials,
            upstream,
            row_offset=row_offset,
            row_ids=row_ids,
            column_ids=column_ids,
            positives=positives,
            pair_count=pair_count,
            label_smoothing=label_smoothing,
            need_rows=need_rows,
            need_columns=need_columns,
        )
    of_rows, of_columns, d_scale = products
    return (
        d_scale.new_empty(0) if of_rows is None else of_rows,
        d_scale.new_empty(0) if of_columns is None else of_columns,
        d_scale,
    )


@contrastive_products.register_fake
def _(
    rows, columns, scale, product, row_norm, column_norm, row_terms, column_terms, own_entry,
    exponentials, upstream, row_ids, column_ids, positives, pair_count, row_offset,
    label_smoothing, need_rows, need_columns, impl,
):  # fmt: skip
    del scale, product, row_norm, column_norm, row_terms, column_terms, own_entry, exponentials
    del upstream, row_ids, column_ids, positives, pair_count, row_offset, label_smoothing, impl
    dtype = compute_dtype(rows.dtype)
    return (
        rows.new_empty(rows.shape if need_rows else 0, dtype=dtype),
        columns.new_empty(columns.shape if need_columns else 0, dtype=dtype),
        rows.new_empty((), dtype=dtype),
    )
