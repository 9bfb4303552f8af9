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
    pair_count: int,
    row_offset: int,
    impl: str,
) -> Tensor:
    """This rank's rows' part of the loss, []."""
    with torch.cuda.device_of(rows):
        return sigmoid_module(impl, rows).sigmoid_loss(
            rows,
            columns,
            scale,
            bias,
            row_offset=row_offset,
            row_ids=row_ids,
            column_ids=column_ids,
            pair_count=pair_count,
        )


@sigmoid_loss.register_fake
def _(rows, columns, scale, bias, row_ids, column_ids, pair_count, row_offset, impl):
    del columns, scale, bias, row_ids, column_ids, pair_count, row_offset, impl
    return rows.new_empty((), dtype=compute_dtype(rows.dtype))


@torch.library.custom_op("fastclip::sigmoid_products", mutates_args=())
def sigmoid_products(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    product: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    pair_count: int,
    row_offset: int,
    need_rows: bool,
    need_columns: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, row_products [b, D], column_products [n, D], d_scale, d_bias, own_entry [b]).

    Products that are not needed come back as [0].
    """
    with torch.cuda.device_of(rows):
        products = sigmoid_module(impl, rows).sigmoid_products(
            rows,
            columns,
            scale,
            bias,
            product,
            row_offset=row_offset,
            row_ids=row_ids,
            column_ids=column_ids,
            pair_count=pair_count,
            need_rows=need_rows,
            need_columns=need_columns,
        )
    loss, of_rows, of_columns, d_scale, d_bias, own_entry = products
    return (
        loss.clone(),
        d_scale.new_empty(0) if of_rows is None else of_rows,
        d_scale.new_empty(0) if of_columns is None else of_columns,
        d_scale.clone(),
        d_bias.clone(),
        own_entry,
    )


@sigmoid_products.register_fake
def _(
    rows, columns, scale, bias, product, row_ids, column_ids, pair_count, row_offset,
    need_rows, need_columns, impl,
):  # fmt: skip
    del scale, bias, product, row_ids, column_ids, pair_count, row_offset, impl
    dtype = compute_dtype(rows.dtype)
    return (
        rows.new_empty((), dtype=dtype),
        rows.new_empty(rows.shape if need_rows else 0, dtype=dtype),
        columns.new_empty(columns.shape if need_columns else 0, dtype=dtype),
        rows.new_empty((), dtype=dtype),
        rows.new_empty((), dtype=dtype),
        rows.new_empty(rows.shape[0], dtype=dtype),
    )
