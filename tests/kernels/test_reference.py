"""Stripes of the reference put together are the whole, whatever the offset."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.kernels.reference import (
    ContrastiveSummary,
    compute_dtype,
    contrastive_products,
    contrastive_statistics,
    contrastive_summary,
    finish_pairs,
    own_targets,
    positives_of,
    prepare_pairs,
    sigmoid_loss,
    sigmoid_products,
)
from loss_oracles import clip_expected, error, features, siglip_expected

SCALE, BIAS = torch.tensor(25.0, dtype=torch.float64), torch.tensor(-7.0, dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)


Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _stripe(image: Tensor, text: Tensor, part: slice) -> Six:
    """What the first pass takes: operands, scale, own products, norms."""
    pairs = prepare_pairs(image, text, image.dtype)
    scale = SCALE.to(compute_dtype(image.dtype))
    return (image[part], text, scale, pairs.product[part], pairs.row_norm[part], pairs.column_norm)


def _options(ids: Tensor | None, part: slice, **more: Any) -> dict[str, Any]:
    if ids is not None:
        more |= {"row_ids": ids[part], "column_ids": ids}
    return {"row_offset": part.start, **more}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("sizes", [(13,), (5, 8), (1, 11, 1)])
def test_stripes_of_the_softmax_loss(sizes: tuple[int, ...], several: bool) -> None:
    pairs = sum(sizes)
    image, text = features(pairs, 6)
    ids, smoothing = (torch.arange(pairs) % 5, 0.05) if several else (None, 0.0)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    product = (image * text).sum(1)
    stripes: list[tuple[Six, dict[str, Any]]] = []
    statistics = []
    for part in parts:
        options = _options(ids, part, label_smoothing=smoothing, chunk_elements=3 * pairs)
        stripes.append((_stripe(image, text, part), options))
        statistics.append(contrastive_statistics(*stripes[-1][0], **options))
    columns = torch.stack([s.others_of_column for s in statistics]).logsumexp(0)
    sums: list[Any] = [0.0, 0.0, 0.0]
    d_image, d_text = [], []
    entries = []
    for part, (operands, options), found in zip(parts, stripes, statistics, strict=True):
        positives = None if ids is None else positives_of(ids[part], ids)
        target = own_targets(positives, smoothing, product[part], pairs)
        summary = contrastive_summary(
            found.others_of_row, columns, product, SCALE, found.gap, target, row_offset=part.start
        )
        products = contrastive_products(*operands, *summary[1:], found.exponentials, ONE, **options)
        assert products.row_products is not None
        for index, value in enumerate((summary.loss, products.column_products, products.d_scale)):
            sums[index] = sums[index] + value
        entries.append((products.row_products, summary.own_entry))
    rows, entry = (torch.cat(x) for x in zip(*entries, strict=True))
    d_image, d_text = finish_pairs(
        rows, sums[1], image, text, entry, image, text, SCALE, ONE, 0.5 / pairs
    )
    expected = clip_expected(image, text, float(SCALE), ids, smoothing)
    assert error(sums[0], expected.loss) < 1e-12
    assert d_image is not None
    assert d_text is not None
    assert error(d_image, expected.d_image) < 1e-12
    assert error(d_text, expected.d_text) < 1e-12
    assert error(sums[2], expected.d_scale) < 1e-11


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 60, 1 << 22])
def test_stripes_of_the_sigmoid_loss(chunk_elements: int, several: bool) -> None:
    image, text = features(13, 6)
    ids = torch.arange(13) % 4 if several else None
    expected = siglip_expected(image, text, float(SCALE), float(BIAS), ids)
    sums = [torch.zeros_like(x) for x in (SCALE, text, SCALE, SCALE)]
    rows, entries = [], []
    for part in (slice(0, 4), slice(4, 13)):
        operands = (image[part], text, SCALE, BIAS)
        options = _options(ids, part, chunk_elements=chunk_elements)
        product = (image * text).sum(1)[part]
        found = sigmoid_products(*operands, product, **options)
        assert torch.equal(found.loss, sigmoid_loss(*operands, **options))
        values = (found.loss, found.column_products, found.d_scale, found.d_bias)
        for total, value in zip(sums, values, strict=True):
            total += value  # pyright: ignore[reportOperatorIssue]
        rows.append(found.row_products)
        entries.append(found.own_entry)
    d_image, d_text = finish_pairs(
        torch.cat(rows), sums[1], image, text, torch.cat(entries), image, text, SCALE, ONE, 1 / 13
    )
    results = (sums[0], d_image, d_text, sums[2], sums[3])
    for value, wanted in zip(results, expected, strict=True):
        assert value is not None
        assert wanted is not None
        assert error(value, wanted) < 1e-11


def test_products_nobody_asked_for_are_not_computed() -> None:
    image, text = features(5, 3)
    operands = _stripe(image, text, slice(0, 5))
    found = contrastive_statistics(*operands)
    summary = contrastive_summary(
        found.others_of_row, found.others_of_column, operands[3], SCALE, found.gap, None
    )
    arguments = (*operands, *summary[1:], found.exponentials, ONE)
    lone = contrastive_products(*arguments, need_rows=False)
    assert lone.row_products is None
    both = contrastive_products(*arguments)
    assert lone.column_products is not None
    assert torch.equal(lone.column_products, both.column_products)  # pyright: ignore[reportArgumentType]
    assert contrastive_products(*arguments, need_columns=False).column_products is None
    sigmoid = sigmoid_products(image, text, SCALE, BIAS, operands[3], need_rows=False)
    assert sigmoid.row_products is None
    assert sigmoid.column_products is not None


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 60, 1 << 22])
def test_statistics_of_a_rectangle(chunk_elements: int, several: bool, smoothing: float) -> None:
    """Every statistic of 7 rows among 19 columns by its definition."""
    image, text = features(19, 5)
    ids = torch.arange(19) % 6 if several else None
    part = slice(4, 11)
    options = _options(ids, part, label_smoothing=smoothing, chunk_elements=chunk_elements)
    statistics = contrastive_statistics(*_stripe(image, text, part), **options)
    logits = SCALE * image[part] @ text.T
    own = logits.diagonal(part.start)
    others = logits.clone()
    others.diagonal(part.start).fill_(-torch.inf)
    same = torch.eye(19)[part].double() if ids is None else (ids[part, None] == ids).double()
    targets = same / same.sum(1, keepdim=True) * (1 - smoothing) + smoothing / 19
    gap = own - (targets * logits).sum(1)
    torch.testing.assert_close(statistics.others_of_row, others.logsumexp(1))
    torch.testing.assert_close(statistics.others_of_column, others.logsumexp(0))
    torch.testing.assert_close(statistics.gap, gap, rtol=1e-9, atol=1e-12)
    if not several and smoothing == 0:
        assert not statistics.gap.any()
    # In two parts, of which one holds no row's own column: what a ring passes on.
    left, right = slice(0, 12), slice(12, 19)
    positives = None if ids is None else positives_of(ids[part], ids)
    found = []
    for columns, offset in ((left, part.start), (right, 7)):
        rows, text_, scale, product, row_norm, norm = _stripe(image, text, part)
        options |= {"row_offset": offset, "positives": positives, "pair_count": 19}
        if ids is not None:
            options["column_ids"] = ids[columns]
        found.append(
            contrastive_statistics(
                rows, text_[columns], scale, product, row_norm, norm[columns], **options
            )
        )
    rows = torch.stack([f.others_of_row for f in found]).logsumexp(0)
    torch.testing.assert_close(rows, statistics.others_of_row)
    torch.testing.assert_close(
        torch.cat([f.others_of_column for f in found]), statistics.others_of_column
    )
    torch.testing.assert_close(found[0].gap + found[1].gap, gap, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_statistics_and_products(dtype: torch.dtype) -> None:
    image, text = (x.to(dtype) for x in features(9, 5))
    operands = _stripe(image, text, slice(0, 9))
    found = contrastive_statistics(*operands)
    assert found.gap.dtype == torch.float32
    wanted = (SCALE * image.double() @ text.double().T).fill_diagonal_(-torch.inf)
    # Exponentials in fp32, but a log-sum-exp near the scale is not rounded to fp32.
    assert float((found.others_of_row - wanted.logsumexp(1)).abs().max()) < 4e-6
    assert found.others_of_row.dtype == found.others_of_column.dtype == torch.float64
    summary = contrastive_summary(
        found.others_of_row, found.others_of_column, operands[3], operands[2], found.gap, None
    )
    assert {x.dtype for x in summary} == {torch.float32}
    part = contrastive_products(*operands, *summary[1:], found.exponentials, ONE)
    assert {x.dtype for x in part if x is not None} == {torch.float32}
    assert sigmoid_loss(image, text, operands[2], operands[2]).dtype == torch.float32
    assert compute_dtype(dtype) == torch.float32
    assert compute_dtype(torch.float64) == torch.float64


def _summary_of(others: Tensor, own: Tensor) -> ContrastiveSummary:
    return contrastive_summary(others, others, own, ONE, torch.zeros_like(own), None)


def test_no_rows_and_no_others() -> None:
    image, text = features(5, 3)
    nothing = contrastive_statistics(*_stripe(image, text, slice(2, 2)), row_offset=2)
    assert nothing.gap.shape == nothing.others_of_row.shape == (0,)
    assert (nothing.others_of_column == -torch.inf).all()
    alone = contrastive_statistics(*_stripe(image[:1], text[:1], slice(0, 1)))
    assert float(alone.others_of_row) == float(alone.others_of_column) == -torch.inf
    summary = _summary_of(alone.others_of_row, ONE.reshape(1))
    assert float(summary.loss) == float(summary.own_entry) == 0.0
    assert not summary.row_terms.any()


def test_softplus_between_fp32s_threshold_and_fp64s() -> None:
    """torch's softplus drops e^−x from x = 20 on: nine digits of fp64."""
    own = torch.zeros(3, dtype=torch.float64)
    for wanted in (19.0, 21.0, 35.0):
        loss = float(_summary_of(torch.full_like(own, wanted), own).loss)
        assert loss - wanted == pytest.approx(math.exp(-wanted), rel=0, abs=8e-15)


def test_terms_keep_what_one_number_would_round() -> None:
    others = torch.linspace(-300.0, 300.0, 601, dtype=torch.float64) + 1 / 3
    own = (others + 1).float()
    summary = contrastive_summary(others, others, own, ONE, torch.zeros_like(own), None)
    power, weight = summary.row_terms.double()
    share = torch.sigmoid(others - own)
    assert float((power + weight.log() - (share.log() - others)).abs().max()) < 2e-7


def test_preparing_and_finishing_equal_autograd() -> None:
    image, text = features(6, 4)
    image, text = image * torch.arange(6)[:, None], text * 3  # one row of zeros
    rows, columns, product, row_norm, column_norm = prepare_pairs(
        image, text, torch.float64, normalize=True
    )
    x, y = image.clone().requires_grad_(), text.clone().requires_grad_()
    a, b = F.normalize(x, dim=1), F.normalize(y, dim=1)
    norms = (a.norm(dim=1), b.norm(dim=1))
    found = (rows, columns, product, row_norm, column_norm)
    for value, wanted in zip(found, (a, b, (a * b).sum(1), *norms), strict=True):
        torch.testing.assert_close(value, wanted.detach())
    entry = torch.randn(6, dtype=torch.float64)
    products = torch.randn(2, 6, 4, dtype=torch.float64)
    results = finish_pairs(
        products[0], products[1], rows, columns, entry, image, text, SCALE, ONE * 2, 0.25,
        normalize=True,
    )  # fmt: skip
    upstream = (products[0] + entry[:, None] * columns, products[1] + entry[:, None] * rows)
    torch.autograd.backward((a, b), [u * SCALE / 2 for u in upstream])
    for value, leaf in zip(results, (x, y), strict=True):
        torch.testing.assert_close(value, leaf.grad)
    lone = finish_pairs(None, products[1], rows, columns, entry, image, text, SCALE, ONE, 1.0)
    assert lone[0] is None
