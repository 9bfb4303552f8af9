"""What concerns each pair alone as operators; meaning and arguments are the reference's.

What is not asked for, or would be an input once more, comes back empty ([0]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.kernels.reference import compute_dtype
from fastclip.ops.dispatch import pairs_module


@torch.library.custom_op("fastclip::prepare_pairs", mutates_args=())
def prepare_pairs(
    image: Tensor, text: Tensor, dtype: torch.dtype, normalize: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rows [b, D], columns [b, D], product [b], row_norm [b], column_norm [b]).

    rows and columns are [0] where they are the features themselves.
    """
    with torch.cuda.device_of(image):
        pairs = pairs_module(impl, image).prepare_pairs(image, text, dtype, normalize=normalize)
    if normalize or image.dtype != dtype:
        return tuple(pairs)
    return image.new_empty(0), text.new_empty(0), *pairs[2:]


@prepare_pairs.register_fake
def _(image, text, dtype, normalize, impl):
    del impl
    whole = normalize or image.dtype != dtype
    wide = compute_dtype(dtype)
    numbers = (image.new_empty(image.shape[0], dtype=wide) for _ in range(3))
    rows = image.new_empty(image.shape if whole else 0, dtype=dtype)
    return rows, text.new_empty(text.shape if whole else 0, dtype=dtype), *numbers


@torch.library.custom_op("fastclip::finish_pairs", mutates_args=())
def finish_pairs(
    row_products: Tensor,
    column_products: Tensor,
    rows: Tensor,
    columns: Tensor,
    own_entry: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    upstream: Tensor,
    factor: float,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(d_image, d_text), like the features or [0] where not needed."""
    with torch.cuda.device_of(rows):
        d_image, d_text = pairs_module(impl, rows).finish_pairs(
            row_products if need_image else None,
            column_products if need_text else None,
            rows,
            columns,
            own_entry,
            image,
            text,
            scale,
            upstream,
            factor,
            normalize=normalize,
        )
    return (
        image.new_empty(0) if d_image is None else d_image,
        text.new_empty(0) if d_text is None else d_text,
    )


@finish_pairs.register_fake
def _(
    row_products, column_products, rows, columns, own_entry, image, text, scale, upstream, factor,
    normalize, need_image, need_text, impl,
):  # fmt: skip
    del row_products, column_products, rows, columns, own_entry, scale, upstream, factor
    del normalize, impl
    return (
        image.new_empty(image.shape if need_image else 0),
        text.new_empty(text.shape if need_text else 0),
    )
