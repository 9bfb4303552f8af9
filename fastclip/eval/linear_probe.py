"""Linear probes (arXiv 2103.00020, section 3.2 and appendix A.3): what features know, by labels."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.eval.features import Features
from fastclip.eval.logistic_regression import Classifier, LogisticRegression

logger = logging.getLogger("fastclip")

Measure = Callable[[Tensor, Tensor], float]
"""From scores fp32 [N, C] and labels to a number, the higher the better."""

Fit = Callable[[float, Classifier | None], Classifier]
"""From the penalty's strength, and a classifier of one nearby, to the classifier."""

VALIDATION_SHARE = 0.2
"""Of the training images, where a data set has no validation split."""

_STEPS_PER_DECADE = 8
_WEAKEST = -6  # decade
_LAST = 12 * _STEPS_PER_DECADE  # the step at 1e6
_FIRST_STRIDE = 2 * _STEPS_PER_DECADE
_SEARCH_TOLERANCE = 1e-4
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ProbeResult:
    """A probe's outcome."""

    value: float
    """The measure on the test images."""

    strength: float
    """λ, the penalty's strength that was chosen; scikit-learn's C is 1 / λ."""

    searched: tuple[tuple[float, float], ...]
    """Strengths and their values on the validation images, from weak to strong."""

    seconds: float

    unconverged: tuple[float, ...]
    """Strengths whose fit still moved after the last iteration."""

    absent: tuple[int, ...]
    """Classes that have no image for training; no test image is ever given one of them."""


def linear_probe(
    train: Features,
    val: Features | None,
    test: Features,
    *,
    metric: Measure,
    seed: int = 0,
) -> ProbeResult:
    """Train a logistic regression on representations, and measure it on the test images.

    As the paper does it: L-BFGS of at most 1,000 iterations, features as they are; the strength of
    the penalty by a search on the validation images over 1e-6 … 1e6, of 96 logarithmic steps, see
    `search_strength`; then trained on training and validation images together. Unlike the paper's,
    every fit goes on until it has converged, whatever the strength; see `LogisticRegression` for
    the objective. The work is done where the features are; see `Features.to`.

    Args:
        val: chooses the strength. None: a fifth of `train`, drawn by `seed` within each class;
            where an image may have several classes, among all images.
        metric: of logits and labels.

    Raises:
        ValueError: the features do not fit together, or there are too few.
    """
    begin = time.perf_counter()
    classes = count_classes(*(part for part in (train, val, test) if part is not None))
    fitting, judging = split(train, seed=seed) if val is None else (train, val)
    everything = train if val is None else train.followed_by(val)
    regression = LogisticRegression(fitting.representation, fitting.labels, classes)
    strength, searched, fits = search_strength(search_fit(regression), judging, metric)
    regression = LogisticRegression(everything.representation, everything.labels, classes)
    final = regression.fit(strength, start=fits[strength], tolerance=_TOLERANCE)
    unconverged = [one for one, fit in fits.items() if not fit.converged]
    if not final.converged:
        unconverged.append(strength)
    report(unconverged, regression.absent, classes)
    return ProbeResult(
        value=metric(final.scores(test.representation), test.labels),
        strength=strength,
        searched=searched,
        seconds=time.perf_counter() - begin,
        unconverged=tuple(sorted(set(unconverged))),
        absent=regression.absent,
    )


def search_fit(regression: LogisticRegression) -> Fit:
    """Its fits as `search_strength` asks for them."""

    def fit(strength: float, start: Classifier | None) -> Classifier:
        return regression.fit(strength, start=start, tolerance=_SEARCH_TOLERANCE)

    return fit


def search_strength(
    fit: Fit, judging: Features, metric: Measure
) -> tuple[float, tuple[tuple[float, float], ...], dict[float, Classifier]]:
    """The paper's parametric binary search for the strength of the penalty.

    It begins with every second decade, 1e-6, 1e-4, …, 1e6, and halves the interval around the peak
    until there are 8 steps in a decade. Of equal peaks the strongest counts. Every fit may start
    from that of the nearest strength.

    Args:
        fit: to the training images.
        judging: the validation images.

    Returns:
        The strength, all that were tried with their values from weak to strong, and their fits.

    Raises:
        ValueError: a value is not a number.
    """
    fits: dict[int, Classifier] = {}
    values: dict[int, float] = {}

    def judge(step: int) -> None:
        near = min(fits, key=lambda other: (abs(other - step), -other), default=None)
        fits[step] = fit(strength_at(step), None if near is None else fits[near])
        value = metric(fits[step].scores(judging.representation), judging.labels)
        if math.isnan(value):
            raise ValueError(
                f"the measure of the validation images is not a number, at strength "
                f"{strength_at(step):g}: no strength can be chosen by it"
            )
        values[step] = value

    def peak() -> int:
        return max(values, key=lambda step: (values[step], step))

    for step in range(_LAST, -1, -_FIRST_STRIDE):  # strong ones are the quickest to begin with
        judge(step)
    stride = _FIRST_STRIDE
    while stride > 1:
        stride //= 2
        centre = peak()
        for step in (centre + stride, centre - stride):
            if 0 <= step <= _LAST and step not in values:
                judge(step)
    searched = tuple((strength_at(step), values[step]) for step in sorted(values))
    return strength_at(peak()), searched, {strength_at(step): one for step, one in fits.items()}


def strength_at(step: int) -> float:
    """1e-6 at step 0, 1e6 at step 96, eight steps in a decade."""
    return 10.0 ** (_WEAKEST + step / _STEPS_PER_DECADE)


def split(features: Features, *, seed: int) -> tuple[Features, Features]:
    """All but a fifth of the images, and that fifth; the same for the same seed.

    Within each class, rounded, but at least one image of a class of two. Where an image may have
    several classes, the fifth is drawn among all images.

    Raises:
        ValueError: there are too few images to hold some out.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = features.labels.cpu()
    order = torch.randperm(len(labels), generator=generator)
    groups = [order]
    if labels.ndim == 1:
        groups = [order[labels[order] == label] for label in labels.unique().tolist()]
    held = torch.zeros(len(labels), dtype=torch.bool)
    for group in groups:
        count = round(VALIDATION_SHARE * len(group))
        held[group[: max(count, int(len(group) > 1))]] = True
    if not bool(held.any()):
        raise ValueError(
            f"of {len(labels)} images, one in each class, none can be held out to choose the "
            "penalty's strength: give validation images, or to few_shot a strength"
        )
    return features.rows((~held).nonzero()[:, 0]), features.rows(held.nonzero()[:, 0])


def count_classes(*parts: Features) -> int:
    """C, common to all parts.

    Raises:
        ValueError: some have one class per image and some several, or other classes.
    """
    first = parts[0]
    for part in parts:
        if not len(part):
            raise ValueError("a probe needs at least one image of each kind, and one kind is empty")
        if (
            part.labels.dtype != first.labels.dtype
            or part.labels.shape[1:] != (first.labels.shape[1:])
        ):
            raise ValueError(
                f"labels of training, validation and test images are alike; these are "
                f"{', '.join(f'{p.labels.dtype} {list(p.labels.shape)}' for p in parts)}"
            )
    if first.labels.ndim == 2:
        return first.labels.shape[1]
    return 1 + max(int(part.labels.max()) for part in parts)


def report(unconverged: list[float], absent: tuple[int, ...], classes: int) -> None:
    """Say once what a reader of the result has to know."""
    if unconverged:
        logger.warning(
            "%d fit(s) of a linear probe had not converged after the last iteration, at strengths "
            "%s",
            len(unconverged),
            ", ".join(f"{strength:g}" for strength in sorted(set(unconverged))),
        )
    if absent:
        logger.warning(
            "%d of %d classes have no image to train a linear probe on, and are never predicted "
            "(first: %d)",
            len(absent),
            classes,
            absent[0],
        )
