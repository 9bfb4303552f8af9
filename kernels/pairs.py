"""What concerns each pair alone, before and after the passes over S, in Triton.

Both are one launch for both towers, and bound by memory: normalisation, the cast to the operands'
dtype and the own pair's product on the way in; the own pair's part of the gradient, the derivative
of the normalisation, scaling and the cast on the way out. Meaning: `fastclip.kernels.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.reference import NORM_FLOOR, PreparedPairs

BLOCK_D = 256
"""Dims that a program holds at a time."""


@triton.jit
def prepare_kernel(
    image,
    text,
    rows,
    columns,
    product,
    row_norm,
    column_norm,
    pairs,
    dims,
    image_stride,
    text_stride,
    norm_floor,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WRITE: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Operands of the passes (where they are not the features themselves), S_ii / s and norms."""
    pair = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = pair[:, None] < pairs
    place = pair.to(tl.int64)[:, None]
    image_length = tl.full((BLOCK_B,), 1.0, tl.float32)
    text_length = tl.full((BLOCK_B,), 1.0, tl.float32)
    if NORMALIZE:
        image_square = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        text_square = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        for first in range(0, dims, BLOCK_D):
            dim = first + tl.arange(0, BLOCK_D)[None, :]
            mask = inside & (dim < dims)
            x = tl.load(image + place * image_stride + dim, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(text + place * text_stride + dim, mask=mask, other=0.0).to(tl.float32)
            image_square += x * x
            text_square += y * y
        image_length = tl.sqrt(tl.sum(image_square, axis=1))
        text_length = tl.sqrt(tl.sum(text_square, axis=1))
        # Not tl.maximum, which loses NaN.
        image_length = tl.where(image_length < norm_floor, norm_floor, image_length)
        text_length = tl.where(text_length < norm_floor, norm_floor, text_length)
    dot = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    row_square = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    column_square = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for first in range(0, dims, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)[None, :]
        mask = inside & (dim < dims)
        x = tl.load(image + place * image_stride + dim, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(text + place * text_stride + dim, mask=mask, other=0.0).to(tl.float32)
        if WRITE:
            low_x = (x / image_length[:, None]).to(rows.dtype.element_ty)
            low_y = (y / text_length[:, None]).to(columns.dtype.element_ty)
            tl.store(rows + place * dims + dim, low_x, mask=mask)
            tl.store(columns + place * dims + dim, low_y, mask=mask)
            x, y = low_x.to(tl.float32), low_y.to(tl.float32)
        dot += x * y
        row_square += x * x
        column_square += y * y
    tl.store(product + pair, tl.sum(dot, axis=1), mask=pair < pairs)
    tl.store(row_norm + pair, tl.sqrt(tl.sum(row_square, axis=1)), mask=pair < pairs)
    tl.store(column_norm + pair, tl.sqrt(tl.sum(column_square, axis=1)), mask=pair < pairs)


@triton.jit
def _finish_tower(
    products,
    other,
    own_entry,
    features,
    output,
    factor,
    pair,
    pairs,
    dims,
    features_stride,
    other_stride,
    norm_floor,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    inside = pair[:, None] < pairs
    place = pair.to(tl.int64)[:, None]
    entry = tl.load(own_entry + pair, mask=pair < pairs, other=0.0)[:, None]
    length = tl.full((BLOCK_B,), 1.0, tl.float32)
    along = tl.zeros((BLOCK_B,), tl.float32)
    if NORMALIZE:
        square = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        dot = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        for first in range(0, dims, BLOCK_D):
            dim = first + tl.arange(0, BLOCK_D)[None, :]
            mask = inside & (dim < dims)
            x = tl.load(features + place * features_stride + dim, mask=mask, other=0.0)
            y = tl.load(other + place * other_stride + dim, mask=mask, other=0.0).to(tl.float32)
            d = tl.load(products + place * dims + dim, mask=mask, other=0.0) + entry * y
            x = x.to(tl.float32)
            square += x * x
            dot += x * d
        length = tl.sqrt(tl.sum(square, axis=1))
        # Below the floor the length counts as constant, as in torch's normalize.
        along = tl.where(length < norm_floor, 0.0, tl.sum(dot, axis=1) / (length * length))
        length = tl.where(length < norm_floor, norm_floor, length)
    for first in range(0, dims, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)[None, :]
        mask = inside & (dim < dims)
        y = tl.load(other + place * other_stride + dim, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(products + place * dims + dim, mask=mask, other=0.0) + entry * y
        if NORMALIZE:
            x = tl.load(features + place * features_stride + dim, mask=mask, other=0.0)
            d = (d - x.to(tl.float32) * along[:, None]) / length[:, None]
        value = (d * factor).to(output.dtype.element_ty)
        tl.store(output + place * dims + dim, value, mask=mask)


@triton.jit
def finish_kernel(
    row_products,
    column_products,
    rows,
    columns,
    own_entry,
    image,
    text,
    scale,
    upstream,
    d_image,
    d_text,
    pairs,
    dims,
    row_stride,
    column_stride,
    image_stride,
    text_stride,
    factor,
    norm_floor,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEED_IMAGE: tl.constexpr,
    NEED_TEXT: tl.constexpr,
):
    """Gradients of the features from the products with G: own pairs, normalisation, cast."""
    pair = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    whole = tl.load(scale) * tl.load(upstream) * factor
    if NEED_IMAGE:
        _finish_tower(
            row_products, columns, own_entry, image, d_image, whole, pair, pairs, dims,
            image_stride, column_stride, norm_floor, BLOCK_B, BLOCK_D, NORMALIZE,
        )  # fmt: skip
    if NEED_TEXT:
        _finish_tower(
            column_products, rows, own_entry, text, d_text, whole, pair, pairs, dims,
            text_stride, row_stride, norm_floor, BLOCK_B, BLOCK_D, NORMALIZE,
        )  # fmt: skip


BLOCK_B = 4
"""Pairs of a program."""


def prepare_pairs(
    image: Tensor, text: Tensor, dtype: torch.dtype, *, normalize: bool = False
) -> PreparedPairs:
    """`reference.prepare_pairs` (no fp64)."""
    image, text = (x if x.stride(-1) == 1 else x.contiguous() for x in (image, text))
    pairs, dims = image.shape
    write = normalize or image.dtype != dtype
    rows = image.new_empty(image.shape, dtype=dtype) if write else image
    columns = text.new_empty(text.shape, dtype=dtype) if write else text
    product = image.new_empty(pairs, dtype=torch.float32)
    row_norm, column_norm = product.new_empty(pairs), product.new_empty(pairs)
    if pairs:
        prepare_kernel[(triton.cdiv(pairs, BLOCK_B),)](
            image, text, rows, columns, product, row_norm, column_norm,
            pairs, dims, image.stride(0), text.stride(0), NORM_FLOOR,
            BLOCK_B=BLOCK_B, BLOCK_D=BLOCK_D, WRITE=write, NORMALIZE=normalize, num_warps=4,
        )  # fmt: skip
    return PreparedPairs(rows, columns, product, row_norm, column_norm)


def finish_pairs(
    row_products: Tensor | None,
    column_products: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    own_entry: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    upstream: Tensor,
    factor: float,
    *,
    normalize: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """`reference.finish_pairs` (no fp64)."""
    image, text, rows, columns = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (image, text, rows, columns)
    )
    pairs, dims = image.shape
    d_image = None if row_products is None else image.new_empty(image.shape)
    d_text = None if column_products is None else text.new_empty(text.shape)
    if pairs:
        finish_kernel[(triton.cdiv(pairs, BLOCK_B),)](
            rows if row_products is None else row_products.contiguous(),
            columns if column_products is None else column_products.contiguous(),
            rows, columns, own_entry, image, text,
            scale.float().reshape(()), upstream.float().reshape(()),
            image if d_image is None else d_image, text if d_text is None else d_text,
            pairs, dims, rows.stride(0), columns.stride(0), image.stride(0), text.stride(0),
            factor, NORM_FLOOR,
            BLOCK_B=BLOCK_B, BLOCK_D=BLOCK_D, NORMALIZE=normalize,
            NEED_IMAGE=d_image is not None, NEED_TEXT=d_text is not None, num_warps=4,
        )  # fmt: skip
    return d_image, d_text
