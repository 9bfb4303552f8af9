"""Stripes of the reference put together are the whole, whatever the offset."""

from __future__ import annotations

import math

import pytest
import torch

from fastclip.kernels.reference import (
    compute_dtype,
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


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 60, 1 << 22])
def test_statistics_of_a_rectangle(chunk_elements: int, several: bool, smoothing: float) -> None:
    """Every statistic of 7 rows among 19 columns by its definition."""
    image, text = features(19, 5)
    ids = torch.arange(19) % 6 if several else None
    rows, offset = image[4:11], 4
    statistics = contrastive_statistics(
        rows,
        text,
        SCALE,
        row_offset=offset,
        row_ids=None if ids is None else ids[4:11],
        column_ids=ids,
        label_smoothing=smoothing,
        chunk_elements=chunk_elements,
    )
    logits = SCALE * rows @ text.T
    own = logits.diagonal(offset)
    others = logits.clone()
    others.diagonal(offset).fill_(-torch.inf)
    same = torch.eye(19)[4:11].double() if ids is None else (ids[4:11, None] == ids).double()
    targets = same / same.sum(1, keepdim=True) * (1 - smoothing) + smoothing / 19
    gap = own - (targets * logits).sum(1)
    torch.testing.assert_close(statistics.own, own)
    torch.testing.assert_close(statistics.others_of_row, others.logsumexp(1))
    torch.testing.assert_close(statistics.others_of_column, others.logsumexp(0))
    torch.testing.assert_close(statistics.gap, gap, rtol=1e-9, atol=1e-12)
    if not several and smoothing == 0:
        assert not statistics.gap.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_statistics_and_gradients(dtype: torch.dtype) -> None:
    image, text = (x.to(dtype) for x in features(9, 5))
    scale = SCALE.float()
    statistics = contrastive_statistics(image, text, scale)
    assert statistics.own.dtype == statistics.gap.dtype == torch.float32
    wanted = (SCALE * image.double() @ text.double().T).fill_diagonal_(-torch.inf)
    # Exponentials in fp32, but a log-sum-exp near the scale is not rounded to fp32.
    assert float((statistics.others_of_row - wanted.logsumexp(1)).abs().max()) < 4e-6
    assert statistics.others_of_row.dtype == statistics.others_of_column.dtype == torch.float64
    part = contrastive_gradients(
        image, text, scale, statistics.others_of_row, statistics.others_of_column, statistics.own
    )
    for gradient in (part.d_rows, part.d_columns, part.d_scale):
        assert gradient is not None
        assert gradient.dtype == torch.float32
    assert sigmoid_loss(image, text, scale, scale).dtype == torch.float64
    assert compute_dtype(dtype) == torch.float32
    assert compute_dtype(torch.float64) == torch.float64


def test_no_rows_and_no_others() -> None:
    image, text = features(5, 3)
    nothing = contrastive_statistics(image[:0], text, SCALE, row_offset=2)
    assert nothing.own.shape == nothing.others_of_row.shape == (0,)
    assert (nothing.others_of_column == -torch.inf).all()
    alone = contrastive_statistics(image[:1], text[:1], SCALE)
    assert float(alone.others_of_row) == float(alone.others_of_column) == -torch.inf
    assert float(contrastive_loss(*alone, count=1)) == 0.0


def test_softplus_between_fp32s_threshold_and_fp64s() -> None:
    """torch's softplus drops e^−x from x = 20 on: nine digits of fp64."""
    own = torch.zeros(3, dtype=torch.float64)
    for wanted in (19.0, 21.0, 35.0):
        others = torch.full_like(own, wanted)
        loss = float(contrastive_loss(others, others, own, own, count=3))
        assert loss - wanted == pytest.approx(math.exp(-wanted), rel=0, abs=8e-15)


@pytest.mark.parametrize("chunk_elements", [1, 60, 1 << 22])
def test_sigmoid_stripes_with_several_positives(chunk_elements: int) -> None:
    image, text = features(13, 6)
    ids = torch.arange(13) % 4
    expected = siglip_expected(image, text, float(SCALE), float(BIAS), ids)
    sums = [torch.zeros_like(x) for x in (SCALE, text, SCALE, SCALE)]
    for part in (slice(0, 4), slice(4, 13)):
        arguments = (image[part], text, SCALE, BIAS)
        options = {"row_offset": part.start, "row_ids": ids[part], "column_ids": ids}
        loss = sigmoid_loss(*arguments, **options, chunk_elements=chunk_elements)
        found = sigmoid_gradients(*arguments, **options, chunk_elements=chunk_elements)
        assert error(found.d_rows, expected.d_image[part]) < 1e-12  # pyright: ignore[reportArgumentType]
        for total, value in zip(
            sums, (loss, found.d_columns, found.d_scale, found.d_bias), strict=True
        ):
            total += value  # pyright: ignore[reportOperatorIssue]
    wanted = (expected.loss, expected.d_text, expected.d_scale, expected.d_bias)
    for total, value in zip(sums, wanted, strict=True):
        assert value is not None
        assert error(total, value) < 1e-11
