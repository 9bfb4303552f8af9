"""Few-shot curves (arXiv 2103.00020, section 3.1.5): how many labels zero-shot is worth."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.eval.features import Features
from fastclip.eval.intervals import t_interval
from fastclip.eval.linear_probe import (
    Measure,
    count_classes,
    report,
    search_fit,
    search_strength,
    split,
)
from fastclip.eval.logistic_regression import LogisticRegression, class_counts

logger = logging.getLogger("fastclip")

_MOST_JUDGING = 4


@dataclass(frozen=True)
class FewShotResult:
    """The measure after so many images of each class."""

    mean: float

    low: float
    """Of the 95 % interval of the mean, by Student's t over the draws."""

    high: float

    values: tuple[float, ...]
    """One for each draw."""

    short_classes: int
    """Classes that have fewer training images than were asked for: all of theirs were used."""


def few_shot(
    train: Features,
    test: Features,
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    repeats: int = 10,
    seed: int = 0,
    metric: Measure,
    strength: float | None = None,
) -> dict[int, FewShotResult]:
    """Linear probes trained on k images of each class, for each k of `shots`.

    Of a draw's images, larger k take those of smaller ones and more. The penalty's strength is
    chosen anew for each draw on min(k, 4) further images of each class, as has become the custom
    with CLIP's few-shot probes (CoOp, arXiv 2109.01134); from where a class has no further ones
    none are taken, and where no class has any, on a fifth of the draw itself.

    Args:
        train: where images are drawn from.
        repeats: draws, 2 at least.
        seed: of the draws; the same seed draws the same images.
        metric: of logits and labels.
        strength: of the penalty, λ = 1 / C; None: chosen as above.

    Raises:
        ValueError: the features do not fit together, an image has several classes, or one image of
            each class is all there is and no strength is given.
    """
    if not shots or min(shots) < 1 or repeats < 2:
        raise ValueError(
            f"shots are 1 or more and repeats 2 or more, not {list(shots)} and {repeats}"
        )
    if train.labels.ndim != 1:
        raise ValueError("few-shot draws are for images of one class each; these may have several")
    classes = count_classes(train, test)
    counts = class_counts(train.labels, classes).cpu()
    generator = torch.Generator().manual_seed(seed)
    draws = [_shuffled(train.labels.cpu(), classes, generator) for _ in range(repeats)]
    results: dict[int, FewShotResult] = {}
    unconverged: list[float] = []
    for k in sorted(set(shots)):
        values = []
        for draw in draws:
            drawn = train.rows(torch.cat([order[:k] for order in draw]))
            rest = torch.cat([order[k : k + min(k, _MOST_JUDGING)] for order in draw])
            judging = train.rows(rest) if len(rest) else None
            value, failed = _probe(drawn, judging, test, classes, metric, strength, seed)
            values.append(value)
            unconverged += failed
        low, high = t_interval(values)
        short = int(((counts > 0) & (counts < k)).sum())
        results[k] = FewShotResult(statistics.fmean(values), low, high, tuple(values), short)
        if short:
            logger.warning(
                "%d class(es) have fewer than %d training images; all of theirs are used", short, k
            )
    report(unconverged, tuple((counts == 0).nonzero()[:, 0].tolist()), classes)
    return results


def equal_shots(zero_shot_value: float, results: Mapping[int, FewShotResult]) -> float | None:
    """The number of images of each class at which a few-shot probe equals zero-shot.

    Where the means first reach it, interpolated over the logarithm of the number, as for the
    paper's figure 7; None where they begin above it or never reach it.
    """
    points = [(k, results[k].mean) for k in sorted(results)]
    if points and points[0][1] == zero_shot_value:
        return float(points[0][0])
    for (k, value), (next_k, next_value) in itertools.pairwise(points):
        if value < zero_shot_value <= next_value:
            share = (zero_shot_value - value) / (next_value - value)
            return math.exp(math.log(k) + share * (math.log(next_k) - math.log(k)))
    return None


def _shuffled(labels: Tensor, classes: int, generator: torch.Generator) -> list[Tensor]:
    """Of each class, its images in an order drawn anew."""
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    return list(by_class.split(torch.bincount(labels, minlength=classes).tolist()))


def _probe(
    drawn: Features,
    judging: Features | None,
    test: Features,
    classes: int,
    metric: Measure,
    strength: float | None,
    seed: int,
) -> tuple[float, list[float]]:
    """The measure on the test images, and strengths whose fits have not converged.

    Unlike `linear_probe`, the images that chose the strength are not trained on: there are k.
    """
    failed = []
    if strength is None:
        fitting = drawn
        if judging is None:
            fitting, judging = split(drawn, seed=seed)
        regression = LogisticRegression(fitting.representation, fitting.labels, classes)
        strength, _, fits = search_strength(search_fit(regression), judging, metric)
        failed = [one for one, fit in fits.items() if not fit.converged]
    regression = LogisticRegression(drawn.representation, drawn.labels, classes)
    final = regression.fit(strength)
    if not final.converged:
        failed.append(strength)
    return metric(final.scores(test.representation), test.labels), failed
