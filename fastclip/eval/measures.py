"""The measures of the CLIP paper's data sets (arXiv 2103.00020, Table 9), and how sure they are.

Each is written once, over weighted images: with weights of one it is the measure itself, with the
counts of a draw with replacement one sample of its bootstrap distribution. A tie counts against the
model where one answer is right, as in `rank_of_target`; a score that is not a number is never
right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastclip.eval.zero_shot import rank_of_target

_NORMAL_QUANTILE = 1.959963984540054  # two-sided 95 %
_CHUNK_WEIGHTS = 2**22  # of a bootstrap, in memory at once: 32 MiB
_RECALL_LEVELS = 10  # 0, 0.1, …, 1


@dataclass(frozen=True)
class Metric:
    """One measure of scores against labels, a fraction."""

    name: str
    """As data sets' files name it."""

    title: str
    """As tables show it."""

    weighted: Callable[[Tensor, Tensor, Tensor], Tensor] = field(repr=False)
    """(scores [N, C], labels, weights fp64 [R, N]) -> fp64 [R]; not a number where a draw leaves
    the measure undefined."""

    several: bool = False
    """Whether an image may have several classes: labels are then bool [N, C], not int64 [N]."""

    spread: Literal["binomial", "bootstrap"] = "bootstrap"
    """How the interval is found."""

    def __call__(self, scores: Tensor, labels: Tensor) -> float:
        """The measure.

        Args:
            scores: [N, C], floating point.
            labels: int64 [N], an image's class; bool [N, C] where it may have several.

        Raises:
            ValueError: shapes do not fit, or the measure is not defined on these labels.
        """
        self._check(scores, labels)
        weights = torch.ones(1, len(scores), dtype=torch.float64, device=scores.device)
        value = float(self.weighted(scores, labels, weights))
        if math.isnan(value):
            raise ValueError(f"{self.title} is not defined: no class has an image to be found")
        return value

    def interval(
        self, scores: Tensor, labels: Tensor, *, resamples: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """Bounds of the 95 % interval over draws of as many images.

        Wilson's interval where the measure is a share of right answers; otherwise the bootstrap's
        percentiles, the same for the same `seed`.

        Raises:
            ValueError: as for the measure.
        """
        value = self(scores, labels)
        if self.spread == "binomial":
            return wilson_interval(value, len(scores))
        generator = torch.Generator().manual_seed(seed)
        rows = max(1, _CHUNK_WEIGHTS // len(scores))
        values = []
        for begin in range(0, resamples, rows):
            shape = (min(rows, resamples - begin), len(scores))
            drawn = torch.randint(len(scores), shape, generator=generator)
            weights = torch.zeros(shape, dtype=torch.float64)
            weights.scatter_add_(1, drawn, torch.ones(shape, dtype=torch.float64))
            values.append(self.weighted(scores, labels, weights.to(scores.device)).cpu())
        bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.cat(values).nanquantile(bounds).tolist()
        return low, high

    def _check(self, scores: Tensor, labels: Tensor) -> None:
        if scores.dim() != 2 or not scores.numel():
            raise ValueError(
                f"scores are [images, classes], at least one of each, not {list(scores.shape)}"
            )
        count, classes = scores.shape
        shape, dtype = ((count, classes), torch.bool) if self.several else ((count,), torch.int64)
        if labels.shape != shape or labels.dtype != dtype:
            raise ValueError(
                f"{self.title} takes labels {dtype} {list(shape)}, not {labels.dtype} "
                f"{list(labels.shape)}"
            )
        if not self.several and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels run from 0 to {classes - 1}")
        if self is ROC_AUC and classes != 2:
            raise ValueError(f"{self.title} is for two classes, not {classes}")


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a probability, of which `share` of `count` trials came true (Wilson)."""
    z2 = _NORMAL_QUANTILE**2
    centre = share + z2 / (2 * count)
    reach = _NORMAL_QUANTILE * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    low, high = (centre - reach) / (1 + z2 / count), (centre + reach) / (1 + z2 / count)
    return max(0.0, low), min(1.0, high)


def _accuracy(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return _mean(rank_of_target(scores, labels) < 1, weights)


def _top5(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return _mean(rank_of_target(scores, labels) < 5, weights)


def _mean_of_top1_and_top5(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    rank = rank_of_target(scores, labels)
    return _mean(((rank < 1).double() + (rank < 5).double()) / 2, weights)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return weights @ values.double() / weights.sum(dim=1)


def _mean_per_class(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    right = (rank_of_target(scores, labels) < 1).double()
    none = weights.new_zeros(len(weights), scores.shape[1])
    images = none.index_add(1, labels, weights)
    hits = none.index_add(1, labels, weights * right)
    return (hits / images).nanmean(dim=1)  # 0 / 0 for a class without image


def _map_11_point(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    columns = [
        _average_precision(scores[:, place], labels[:, place], weights)
        for place in range(scores.shape[1])
        if bool(labels[:, place].any())
    ]
    if not columns:
        return weights.new_full((len(weights),), math.nan)
    return torch.stack(columns).nanmean(dim=0)


def _average_precision(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Of one class: the mean, over eleven recalls, of the best precision at that recall or more.

    Images of one score are found together, so that their order does not matter.
    """
    values, order = scores.double().nan_to_num(nan=-math.inf).sort(descending=True, stable=True)
    found = weights[:, order].cumsum(dim=1)
    right = (weights[:, order] * labels[order]).cumsum(dim=1)
    last = torch.ones_like(labels)
    last[:-1] = values[1:] != values[:-1]  # of the images of one score
    found, right = found[:, last], right[:, last].contiguous()
    precision = (right / found).nan_to_num(nan=0.0)  # nothing found yet
    best = precision.flip(1).cummax(dim=1).values.flip(1)
    levels = torch.arange(_RECALL_LEVELS + 1, dtype=torch.float64, device=scores.device)
    total = right[:, -1:]
    # Whole numbers, so that a recall of 3 in 10 is not below 0.3.
    first = torch.searchsorted(right * _RECALL_LEVELS, levels * total)
    result = best.gather(1, first).mean(dim=1)
    return result.masked_fill(total[:, 0] == 0, math.nan)


def _roc_auc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """How often an image of class 1 scores above one of class 0; equal scores count half."""
    positive = labels == 1
    difference = scores[:, 1].double() - scores[:, 0].double()
    worst = torch.where(positive, -math.inf, math.inf).double()
    difference = torch.where(difference.isnan(), worst, difference)
    values, place = difference.unique(return_inverse=True)
    none = weights.new_zeros(len(weights), len(values))
    ones = none.index_add(1, place, weights * positive)
    zeros = none.index_add(1, place, weights * ~positive)
    below = zeros.cumsum(dim=1) - zeros / 2
    return (ones * below).sum(dim=1) / (ones.sum(dim=1) * zeros.sum(dim=1))


ACCURACY = Metric("accuracy", "accuracy", _accuracy, spread="binomial")
TOP5 = Metric("top5", "top-5", _top5, spread="binomial")
MEAN_PER_CLASS = Metric("mean_per_class", "mean per class", _mean_per_class)
MAP_11_POINT = Metric("map_11_point", "11-point mAP", _map_11_point, several=True)
ROC_AUC = Metric("roc_auc", "ROC AUC", _roc_auc)
MEAN_TOP1_TOP5 = Metric("mean_top1_top5", "mean of top-1, top-5", _mean_of_top1_and_top5)

METRICS = {
    metric.name: metric
    for metric in (ACCURACY, MEAN_PER_CLASS, MAP_11_POINT, ROC_AUC, MEAN_TOP1_TOP5)
}
"""Those that a data set may name."""
