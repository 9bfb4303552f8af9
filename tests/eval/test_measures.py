"""Measures against scikit-learn, against their definitions in plain loops, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastclip.eval.measures import (
    ACCURACY,
    MAP_11_POINT,
    MEAN_PER_CLASS,
    MEAN_TOP1_TOP5,
    METRICS,
    ROC_AUC,
    TOP5,
    Metric,
    wilson_interval,
)

sklearn_metrics = pytest.importorskip("sklearn.metrics")


def _scores(images: int, classes: int, levels: int | None = None) -> Tensor:
    """Random ones; of few `levels`, so that many are equal."""
    generator = torch.Generator().manual_seed(images * classes)
    if levels is None:
        return torch.randn(images, classes, generator=generator)
    return torch.randint(levels, (images, classes), generator=generator).float()


def _labels(images: int, classes: int) -> Tensor:
    return torch.randint(classes, (images,), generator=torch.Generator().manual_seed(images))


def test_accuracy_and_mean_per_class_are_scikit_learns() -> None:
    scores, labels = _scores(211, 9), _labels(211, 9)
    guesses = scores.argmax(dim=1)
    assert ACCURACY(scores, labels) == sklearn_metrics.accuracy_score(labels, guesses)
    expected = sklearn_metrics.balanced_accuracy_score(labels, guesses)
    assert MEAN_PER_CLASS(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_top_5_is_scikit_learns() -> None:
    scores, labels = _scores(211, 9), _labels(211, 9)
    top5 = sklearn_metrics.top_k_accuracy_score(labels, scores.numpy(), k=5)
    assert TOP5(scores, labels) == pytest.approx(top5, abs=1e-12)
    mean = (ACCURACY(scores, labels) + top5) / 2
    assert MEAN_TOP1_TOP5(scores, labels) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("levels", [None, 2, 5])
def test_roc_auc_is_scikit_learns(levels: int | None) -> None:
    scores, labels = _scores(157, 2, levels), _labels(157, 2)
    expected = sklearn_metrics.roc_auc_score(labels, (scores[:, 1] - scores[:, 0]).double())
    assert ROC_AUC(scores, labels) == pytest.approx(expected, abs=1e-12)


def _eleven_points(scores: list[float], truth: list[bool]) -> float:
    """The definition: precision and recall at every threshold that a score makes."""
    points = []
    for threshold in set(scores):
        found = [right for score, right in zip(scores, truth, strict=True) if score >= threshold]
        points.append((sum(found) / len(found), sum(found), sum(truth)))
    best = [max(p for p, n, total in points if 10 * n >= k * total) for k in range(11)]
    return sum(best) / 11


@pytest.mark.parametrize("levels", [None, 3])
def test_map_is_the_definition(levels: int | None) -> None:
    scores = _scores(60, 4, levels)
    labels = _scores(60, 4) > 1
    labels[:, 2] = False  # nothing to be found: left out of the mean
    expected = np.mean(
        [_eleven_points(scores[:, c].tolist(), labels[:, c].tolist()) for c in (0, 1, 3)]
    )
    assert MAP_11_POINT(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_map_of_ten_images_by_hand() -> None:
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    labels = torch.tensor([[True], [False], [True], [False]])
    # Precision 1 up to a recall of 1/2 (six levels), then 2/3 (five).
    assert MAP_11_POINT(scores, labels) == pytest.approx((6 + 5 * 2 / 3) / 11)


@pytest.mark.parametrize("metric", [*METRICS.values(), TOP5], ids=lambda metric: metric.name)
def test_order_does_not_matter_and_perfect_is_one(metric: Metric) -> None:
    classes = 2 if metric is ROC_AUC else 7
    scores, labels = _scores(90, classes, 12), _labels(90, classes)
    one_hot = torch.nn.functional.one_hot(labels, classes)
    if metric.several:
        labels = one_hot.bool()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    value = metric(scores, labels)
    assert 0 < value < 1
    assert metric(scores[order], labels[order]) == pytest.approx(value, abs=1e-12)
    assert metric(one_hot.float(), labels) == 1.0


@pytest.mark.parametrize("metric", [*METRICS.values(), TOP5], ids=lambda metric: metric.name)
def test_an_interval_holds_the_value_and_narrows(metric: Metric) -> None:
    classes = 2 if metric is ROC_AUC else 7
    widths = []
    for images in (50, 800):
        labels = _labels(images, classes)
        one_hot = torch.nn.functional.one_hot(labels, classes)
        scores = _scores(images, classes) + one_hot
        labels = one_hot.bool() if metric.several else labels
        low, high = metric.interval(scores, labels, resamples=300)
        assert (low, high) == metric.interval(scores, labels, resamples=300)
        assert 0 <= low < metric(scores, labels) < high <= 1
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_bootstrap_of_an_accuracy_is_binomial() -> None:
    scores, labels = _scores(500, 2), _labels(500, 2)
    twice = MEAN_TOP1_TOP5.interval(scores, labels, resamples=4000)  # (top-1 + 1) / 2
    expected = wilson_interval(ACCURACY(scores, labels), 500)
    assert [2 * bound - 1 for bound in twice] == pytest.approx(expected, abs=0.006)


def test_wilson_interval() -> None:
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_broken_scores_are_never_right() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    scores[1] = math.nan
    assert ACCURACY(scores, labels) == 0.75
    assert ROC_AUC(scores, labels) == 0.5
    truth = torch.nn.functional.one_hot(labels, 2).bool()
    assert MAP_11_POINT(scores, truth) < 1


def test_collapsed_scores_are_wrong_and_undecided() -> None:
    scores, labels = torch.zeros(8, 2), torch.arange(8) % 2
    assert ACCURACY(scores, labels) == MEAN_PER_CLASS(scores, labels) == 0
    assert ROC_AUC(scores, labels) == 0.5


@pytest.mark.parametrize(
    ("metric", "scores", "labels", "message"),
    [
        (ACCURACY, torch.zeros(0, 3), torch.zeros(0).long(), "at least one of each"),
        (ACCURACY, torch.zeros(2, 3), torch.zeros(2, 3).bool(), "accuracy takes labels"),
        (ACCURACY, torch.zeros(2, 3), torch.tensor([0, 3]), "labels run from 0 to 2"),
        (MAP_11_POINT, torch.zeros(2, 3), torch.zeros(2).long(), "11-point mAP takes labels"),
        (MAP_11_POINT, torch.zeros(2, 3), torch.zeros(2, 3).bool(), "not defined"),
        (ROC_AUC, torch.zeros(2, 3), torch.tensor([0, 1]), "two classes, not 3"),
        (ROC_AUC, torch.zeros(2, 2), torch.tensor([1, 1]), "not defined"),
    ],
)
def test_what_no_measure_is_defined_on(
    metric: Metric, scores: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(scores, labels)
