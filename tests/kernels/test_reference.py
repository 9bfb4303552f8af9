"""Stripes of the reference put together are the whole, whatever the offset."""

from __future__ import annotations

import pytest
import torch

from fastclip.kernels.reference import (
    contrastive_gradients,
    contrastive_loss,
    contrastive_statistics,
    sigmoid_gradients,
    sigmoid_loss,
)
from loss_oracles import clip_expected, error, features, siglip_expected

SCALE, BIAS = torch.tensor(25.0, dtype=torch.float64), torch.tensor(-7.0, dtype=torch.float64)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("sizes", [(13,), (5, 8), (1, 11, 1)])
def test_stripes_of_the_softmax_loss(sizes: tuple[int, ...], several: bool) -> None:
    pairs = sum(sizes)
    image, text = features(pairs, 6)
    ids = torch.arange(pairs) % 5 if several else None
    stripes = []
    offset = 0
    for size in sizes:
        options = {
            "row_offset": offset,
            "row_ids": None if ids is None else ids[offset : offset + size],
            "column_ids": ids,
            "label_smoothing": 0.05 if several else 0.0,
            "chunk_elements": 3 * pairs,
        }
        rows = image[offset : offset + size]
        stripes.append((rows, options, contrastive_statistics(rows, text, SCALE, **options)))
        offset += size
    columns = torch.stack([s.others_of_column for _, _, s in stripes]).logsumexp(0)
    own = torch.cat([s.own for _, _, s in stripes])
    torch.testing.assert_close(own, SCALE * (image * text).sum(1))
    loss = torch.zeros((), dtype=torch.float64)
    d_image, d_text, d_scale = [], torch.zeros_like(text), torch.zeros((), dtype=torch.float64)
    for rows, options, statistics in stripes:
        mine = slice(options["row_offset"], options["row_offset"] + len(rows))
        loss += contrastive_loss(
            statistics.others_of_row, columns[mine], statistics.own, statistics.gap, pairs
        )
        part = contrastive_gradients(
            rows, text, SCALE, statistics.others_of_row, columns, own, **options
        )
        assert part.d_rows is not None
        assert part.d_columns is not None
        d_image.append(part.d_rows)
        d_text += part.d_columns
        d_scale += part.d_scale
    smoothing = 0.05 if several else 0.0
    expected = clip_expected(image, text, float(SCALE), ids, smoothing)
    assert error(loss, expected.loss) < 1e-12
    assert error(torch.cat(d_image), expected.d_image) < 1e-12
    assert error(d_text, expected.d_text) < 1e-12
    assert error(d_scale, expected.d_scale) < 1e-11


def test_stripes_of_the_sigmoid_loss() -> None:
    image, text = features(13, 6)
    loss = torch.zeros((), dtype=torch.float64)
    d_text = torch.zeros_like(text)
    d_image = []
    for part in (slice(0, 4), slice(4, 13)):
        rows, offset = image[part], part.start
        loss += sigmoid_loss(rows, text, SCALE, BIAS, row_offset=offset, chunk_elements=26)
        gradients = sigmoid_gradients(rows, text, SCALE, BIAS, row_offset=offset, chunk_elements=26)
        assert gradients.d_rows is not None
        assert gradients.d_columns is not None
        d_image.append(gradients.d_rows)
        d_text += gradients.d_columns
    expected = siglip_expected(image, text, float(SCALE), float(BIAS))
    assert error(loss, expected.loss) < 1e-12
    assert error(torch.cat(d_image), expected.d_image) < 1e-12
    assert error(d_text, expected.d_text) < 1e-12


def test_gradients_nobody_asked_for_are_not_computed() -> None:
    image, text = features(5, 3)
    statistics = contrastive_statistics(image, text, SCALE)
    arguments = (
        image,
        text,
        SCALE,
        statistics.others_of_row,
        statistics.others_of_column,
        statistics.own,
    )
    lone = contrastive_gradients(*arguments, need_rows=False)
    assert lone.d_rows is None
    both = contrastive_gradients(*arguments)
    assert lone.d_columns is not None
    assert torch.equal(lone.d_columns, both.d_columns)  # pyright: ignore[reportArgumentType]
    assert contrastive_gradients(*arguments, need_columns=False).d_columns is None
    assert sigmoid_gradients(image, text, SCALE, BIAS, need_rows=False).d_rows is None
