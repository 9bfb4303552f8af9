"""The sigmoid loss's passes as operators; meaning and arguments are the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.kernels.reference import compute_dtype
from fastclip.ops.dispatch import sigmoid_module


@torch.library.custom_op("fastclip::sigmoid_loss", mutates_args=())
def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    row_offset: int,
    impl: str,
) -> Tensor:
    """This rank's rows' part of the loss, fp64 []."""
    return sigmoid_module(impl, rows).sigmoid_loss(
        rows,
        columns,
        scale,
        bias,
        row_offset=row_offset,
        row_ids=row_ids,
        column_ids=column_ids,
    )


@sigmoid_loss.register_fake
def _(rows, columns, scale, bias, row_ids, column_ids, row_offset, impl):
    del columns, scale, bias, row_ids, column_ids, row_offset, impl
    return rows.new_empty((), dtype=torch.float64)


@torch.library.custom_op("fastclip::sigmoid_gradients", mutates_args=())
def sigmoid_gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    row_offset: int,
    need_rows: bool,
    need_columns: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_rows [b, D] or [0], d_columns [N, D] or [0], d_scale [], d_bias [])."""
    gradients = sigmoid_module(impl, rows).sigmoid_gradients(
        rows,
        columns,
        scale,
        bias,
        row_offset=row_offset,
        row_ids=row_ids,
        column_ids=column_ids,
        need_rows=need_rows,
        need_columns=need_columns,
    )
    empty = gradients.d_scale.new_empty(0)
    d_rows = gradients.d_rows if gradients.d_rows is not None else empty
    d_columns = gradients.d_columns if gradients.d_columns is not None else empty.clone()
    return d_rows, d_columns, gradients.d_scale, gradients.d_bias


@sigmoid_gradients.register_fake
def _(
    rows, columns, scale, bias, row_ids, column_ids, row_offset, need_rows, need_columns, impl
):  # fmt: skip
    del scale, bias, row_ids, column_ids, row_offset, impl
    dtype = compute_dtype(rows.dtype)
    return (
        rows.new_empty(rows.shape if need_rows else 0, dtype=dtype),
        columns.new_empty(columns.shape if need_columns else 0, dtype=dtype),
        rows.new_empty((), dtype=dtype),
        rows.new_empty((), dtype=dtype),
    )
