"""What a loss and its gradients should be: fp64, written from the definitions.

The whole similarity matrix is walked once, in chunks of rows, for the loss and the log-sum-exps.
Gradients are then computed for a sample of rows only, so that N = 262,144 costs one product of that
size and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 26
"""Entries of S held at a time (512 MiB in fp64)."""

FULL_SAMPLE = 8192
"""Up to so many pairs all gradients are compared."""

SAMPLE = 512
"""Evenly spaced rows beyond that."""


class Expected(NamedTuple):
    """fp64 values that results are compared with."""

    loss: float
    sample: Tensor
    """int64 [k], the rows whose gradients follow."""

    d_image: Tensor
    """[k, D]."""

    d_text: Tensor
    """[k, D]."""


class Errors(NamedTuple):
    """Relative errors; the gradients' is the larger of both towers', ‖Δ‖/‖expected‖."""

    loss: float
    gradient: float | None


def expected_contrastive(
    image: Tensor, text: Tensor, scale: float, bias: float | None, normalize: bool
) -> Expected:
    """Of the symmetric softmax loss for features [N, D] of any dtype; `bias` cancels in it."""
    del bias
    x, y = _unit(image, normalize), _unit(text, normalize)
    count = len(x)
    row_lse, column_lse = x.new_empty(count), x.new_full((count,), float("-inf"))
    for chunk in _chunks(count):
        logits = scale * x[chunk] @ y.T
        row_lse[chunk] = logits.logsumexp(1)
        column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
    loss = ((row_lse + column_lse) / 2 - scale * (x * y).sum(1)).mean()
    sample = _sample(x)

    def gradient(rows: Tensor, columns: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
        logits = scale * rows[sample] @ columns.T
        entries = (logits - mine[sample, None]).exp() + (logits - theirs).exp()
        entries[torch.arange(len(sample)), sample] -= 2
        return scale / (2 * count) * entries @ columns

    d_image, d_text = gradient(x, y, row_lse, column_lse), gradient(y, x, column_lse, row_lse)
    return _expected(loss, sample, d_image, d_text, image, text, normalize)


def expected_sigmoid(
    image: Tensor, text: Tensor, scale: float, bias: float | None, normalize: bool
) -> Expected:
    """Of the sigmoid loss, −(1/N)·Σ_ij log σ(±(scale·cos_ij + bias))."""
    shift = 0.0 if bias is None else bias
    x, y = _unit(image, normalize), _unit(text, normalize)
    count = len(x)
    own = scale * (x * y).sum(1) + shift
    # As if every answer were no, and then the difference that the N own pairs make: −own.
    total = -own.sum()
    for chunk in _chunks(count):
        total += F.softplus(scale * x[chunk] @ y.T + shift, threshold=40.0).sum()
    sample = _sample(x)

    def gradient(rows: Tensor, columns: Tensor) -> Tensor:
        entries = torch.sigmoid(scale * rows[sample] @ columns.T + shift)
        entries[torch.arange(len(sample)), sample] -= 1
        return scale / count * entries @ columns

    d_image, d_text = gradient(x, y), gradient(y, x)
    return _expected(total / count, sample, d_image, d_text, image, text, normalize)


def errors(
    expected: Expected, loss: Tensor, d_image: Tensor | None, d_text: Tensor | None
) -> Errors:
    """Errors of results with the full shapes [], [N, D], [N, D]; NaN where they are NaN."""
    loss_error = abs(float(loss) - expected.loss) / max(abs(expected.loss), 1e-300)
    if d_image is None or d_text is None:
        return Errors(loss_error, None)
    both = torch.stack(
        [
            (given[expected.sample].double() - wanted).norm() / wanted.norm()
            for given, wanted in ((d_image, expected.d_image), (d_text, expected.d_text))
        ]
    )
    return Errors(loss_error, float(both.max()))


def _unit(features: Tensor, normalize: bool) -> Tensor:
    wide = features.detach().double()
    return F.normalize(wide, dim=1) if normalize else wide


def _chunks(count: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // count)
    return (slice(first, first + size) for first in range(0, count, size))


def _sample(x: Tensor) -> Tensor:
    count = len(x)
    if count <= FULL_SAMPLE:
        return torch.arange(count, device=x.device)
    return torch.arange(SAMPLE, device=x.device) * count // SAMPLE


def _expected(
    loss: Tensor,
    sample: Tensor,
    d_image: Tensor,
    d_text: Tensor,
    image: Tensor,
    text: Tensor,
    normalize: bool,
) -> Expected:
    if normalize:
        d_image = _through_normalize(d_image, image[sample])
        d_text = _through_normalize(d_text, text[sample])
    return Expected(float(loss), sample, d_image, d_text)


def _through_normalize(gradient: Tensor, features: Tensor) -> Tensor:
    """Gradient by the features as they came: its part across the unit vector, over the length."""
    wide = features.detach().double()
    length = wide.norm(dim=1, keepdim=True)
    unit = wide / length
    return (gradient - unit * (gradient * unit).sum(1, keepdim=True)) / length
