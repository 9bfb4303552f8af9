"""How many lists a search looks through: as many as a measured recall asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastclip.search.exact import search_exact

logger = logging.getLogger("fastclip")

NEAREST = 10
"""Results that the recall is of."""

CANDIDATES = 4
"""Entries of lists that are compared by their stored features, for each result."""

TARGET_RECALL = 0.95
_LEAST_PROBES = 8
_SAME = 1e-6
"""Scores that differ by less are of features that are equally near."""


class Searchable(Protocol):
    """`Lists`, or another way to find candidates."""

    def candidates(self, queries: Tensor, count: int, probes: int) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Recall:
    """Of one kind of queries."""

    mean: float
    error: float
    """Standard error of the mean."""


def gather(parts: Sequence[Tensor], numbers: NDArray[np.int64]) -> Tensor:
    """Features by their numbers, fp32 [n, D]."""
    found = torch.empty(len(numbers), parts[0].shape[1])
    ends = np.cumsum([len(part) for part in parts])
    places = np.searchsorted(ends, numbers, side="right")
    for place in np.unique(places):
        own = np.flatnonzero(places == place)
        rows = numbers[own] - ends[place] + len(parts[place])
        found[torch.from_numpy(own)] = parts[place][torch.from_numpy(rows)].float()
    return found


def rerank(
    parts: Sequence[Tensor], query: Tensor, candidates: NDArray[np.int64], k: int
) -> tuple[Tensor, NDArray[np.int64]]:
    """The best k of some records by their stored features: scores fp32 [k'], numbers [k'].

    Args:
        query: fp32 [D] of unit length.
        candidates: numbers, each once; -1 for none.
    """
    numbers = np.sort(candidates[candidates >= 0])
    scores = gather(parts, numbers) @ query
    order = scores.sort(descending=True, stable=True).indices[:k]
    return scores[order], numbers[order.numpy()]


def probes_for(k: int, probes: int) -> int:
    """Lists for k results, `probes` being those for `NEAREST`."""
    return probes * -(-k // NEAREST)


def expected_scores(parts: Sequence[Tensor], queries: Tensor, leave_first: bool) -> Tensor:
    """Of each query, the score that its `NEAREST` nearest have at least, fp32 [M].

    Args:
        leave_first: queries are features of the index, each nearest to itself, which is not
            counted.
    """
    scores, _ = search_exact(parts, queries, NEAREST + leave_first)
    return scores[:, -1]


def measure_recall(
    lists: Searchable,
    parts: Sequence[Tensor],
    queries: Tensor,
    least: Tensor,
    probes: int,
    leave_first: bool,
) -> Recall:
    """How many of the nearest are found; of equally near ones each counts.

    Args:
        least: from `expected_scores`.
    """
    k = NEAREST + leave_first
    found = lists.candidates(queries, k * CANDIDATES, probes)
    shares = []
    for query, row, score in zip(queries, found, least, strict=True):
        scores, _ = rerank(parts, query, row, k)
        right = int((scores >= score - _SAME).sum())
        shares.append(max(0, right - leave_first) / NEAREST)
    spread = float(np.std(shares)) / len(shares) ** 0.5
    return Recall(float(np.mean(shares)), spread)


def choose_probes(
    lists: Searchable,
    most: int,
    parts: Sequence[Tensor],
    images: Tensor,
    texts: Tensor,
    target: float = TARGET_RECALL,
) -> tuple[int, Mapping[str, float]]:
    """The first of 8, 12, 18, … probes with which both kinds of queries reach the target.

    By two standard errors.

    Args:
        most: lists there are.
        images: features that are in the index, fp32 [M, D].
        texts: features of texts, fp32 [M', D]; M' may be 0.
        target: share of the `NEAREST` nearest.

    Returns:
        The probes, and the recall of "images" and, if there are some, of "texts".
    """
    kinds = {"images": (images, True), "texts": (texts, False)}
    kinds = {name: kind for name, kind in kinds.items() if len(kind[0])}
    least = {name: expected_scores(parts, *kind) for name, kind in kinds.items()}
    probes = min(_LEAST_PROBES, most)
    while True:
        recalls = {
            name: measure_recall(lists, parts, queries, least[name], probes, leave_first)
            for name, (queries, leave_first) in kinds.items()
        }
        enough = all(recall.mean - 2 * recall.error >= target for recall in recalls.values())
        if enough or probes == most:
            break
        probes = min(probes + max(1, probes // 2), most)
    means = {name: recall.mean for name, recall in recalls.items()}
    if not enough:
        logger.warning("all lists together reach a recall of %s, not %g", means, target)
    return probes, means
