"""The nearest of all features, compared one by one: the definition of a search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_BLOCK_BYTES = 8 << 20
"""Of features turned into fp32 at a time: near the cache, and worth a start of all threads."""

_MOST_SCORES = 1 << 22
"""Held at a time."""


def search_exact(
    parts: Sequence[Tensor], queries: Tensor, k: int, chosen: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The k features of the greatest inner products with each query; equal ones by their numbers.

    The order is that of `fastclip.ops.similarity.similarity_topk`; products are summed in fp32, and
    features of half precision need no copy of them all.

    Args:
        parts: features, fp16 or fp32 [n, D] each, numbered on from part to part.
        queries: fp32 [M, D].
        k: how many, at least 1.
        chosen: of each part the rows to look at, int64, rising; None: all.

    Returns:
        scores: fp32 [M, k'] with k' = min(k, features there are), falling.
        numbers: int64 [M, k'].
    """
    scores = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64)
    for found, own in _chunks(parts, queries, chosen):
        # Earlier numbers stand before later ones already, so that a stable order keeps them so.
        found = torch.cat([scores, found], dim=1)
        own = torch.cat([numbers, own.expand(len(queries), -1)], dim=1)
        order = _largest(found, min(k, found.shape[1]))
        scores, numbers = found.gather(1, order), own.gather(1, order)
    return scores, numbers


def _chunks(
    parts: Sequence[Tensor], queries: Tensor, chosen: Sequence[Tensor] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores of some features [M, n], in memory that is used again, and their numbers [n]."""
    total = sum(map(len, parts if chosen is None else chosen))
    dim = parts[0].shape[1]
    block = torch.empty(max(64, _BLOCK_BYTES // (4 * dim)), dim)
    length = max(len(block), min(total, 32_768, _MOST_SCORES // max(len(queries), 1)))
    scores = torch.empty(len(queries), length)
    numbers = torch.empty(length, dtype=torch.int64)
    filled = first = 0
    for place, part in enumerate(parts):
        rows = len(part) if chosen is None else len(chosen[place])
        done = 0
        while done < rows:
            count = min(len(block), rows - done, length - filled)
            if chosen is None:
                keys = part[done : done + count]
                torch.arange(first + done, first + done + count, out=numbers[filled:][:count])
            else:
                own = chosen[place][done : done + count]
                keys = part[own]
                torch.add(own, first, out=numbers[filled:][:count])
            if keys.dtype != torch.float32:
                keys = block[:count].copy_(keys)
            scores[:, filled : filled + count] = queries @ keys.T
            filled, done = filled + count, done + count
            if filled == length:
                yield scores, numbers
                filled = 0
        first += len(part)
    if filled:
        yield scores[:, :filled], numbers[:filled]


def _largest(scores: Tensor, k: int) -> Tensor:
    """Places of each row's k largest in the order of a stable descending sort, int64 [M, k]."""
    least = scores.topk(k, dim=1).values[:, -1:]
    places = torch.empty(len(scores), k, dtype=torch.int64)
    for row, (values, bound) in enumerate(zip(scores, least, strict=True)):
        there = (values >= bound).nonzero()[:, 0]  # more than k where the last ones are equal
        order = values[there].sort(descending=True, stable=True).indices[:k]
        places[row] = there[order]
    return places
