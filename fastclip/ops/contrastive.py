"""The softmax loss's two passes as operators; meaning and arguments are the reference's.

What is not asked for comes back empty ([0]), since an operator's results are tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.kernels.reference import compute_dtype
from fastclip.ops.dispatch import contrastive_module


@torch.library.custom_op("fastclip::contrastive_statistics", mutates_args=())
def contrastive_statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    row_offset: int,
    label_smoothing: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(others_of_row fp64 [b], others_of_column fp64 [N], own [b], gap [b])."""
    statistics = contrastive_module(impl, rows).contrastive_statistics(
        rows,
        columns,
        scale,
        row_offset=row_offset,
        row_ids=row_ids,
        column_ids=column_ids,
        label_smoothing=label_smoothing,
    )
    return tuple(statistics)


@contrastive_statistics.register_fake
def _(rows, columns, scale, row_ids, column_ids, row_offset, label_smoothing, impl):
    del scale, row_ids, column_ids, row_offset, label_smoothing, impl
    own = rows.new_empty(rows.shape[0], dtype=compute_dtype(rows.dtype))
    others_of_column = columns.new_empty(columns.shape[0], dtype=torch.float64)
    return (
        own.new_empty(own.shape, dtype=torch.float64),
        others_of_column,
        own,
        own.new_empty(own.shape),
    )


@torch.library.custom_op("fastclip::contrastive_gradients", mutates_args=())
def contrastive_gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    others_of_row: Tensor,
    others_of_column: Tensor,
    own_of_column: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    row_offset: int,
    label_smoothing: float,
    need_rows: bool,
    need_columns: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_rows [b, D] or [0], d_columns [N, D] or [0], d_scale [])."""
    gradients = contrastive_module(impl, rows).contrastive_gradients(
        rows,
        columns,
        scale,
        others_of_row,
        others_of_column,
        own_of_column,
        row_offset=row_offset,
        row_ids=row_ids,
        column_ids=column_ids,
        label_smoothing=label_smoothing,
        need_rows=need_rows,
        need_columns=need_columns,
    )
    empty = gradients.d_scale.new_empty(0)
    d_rows = gradients.d_rows if gradients.d_rows is not None else empty
    d_columns = gradients.d_columns if gradients.d_columns is not None else empty.clone()
    return d_rows, d_columns, gradients.d_scale


@contrastive_gradients.register_fake
def _(
    rows, columns, scale, others_of_row, others_of_column, own_of_column, row_ids, column_ids,
    row_offset, label_smoothing, need_rows, need_columns, impl,
):  # fmt: skip
    del scale, others_of_row, others_of_column, own_of_column, row_ids, column_ids
    del row_offset, label_smoothing, impl
    dtype = compute_dtype(rows.dtype)
    return (
        rows.new_empty(rows.shape if need_rows else 0, dtype=dtype),
        columns.new_empty(columns.shape if need_columns else 0, dtype=dtype),
        rows.new_empty((), dtype=dtype),
    )
