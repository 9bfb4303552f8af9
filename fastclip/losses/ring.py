"""One tower's blocks going round the ranks, so that no rank holds more than two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from fastclip.losses.common import Ranks


class Block(NamedTuple):
    """One rank's columns."""

    columns: Tensor
    """[n, D]"""

    norm: Tensor
    """[n]"""

    ids: Tensor | None
    """[n], int64"""

    terms: Tensor | None
    """[n, …], whatever else the columns need"""

    own: bool
    """Whether these are this rank's own."""


def ring_lap(
    own: Block, carried: Tensor, ranks: Ranks, visit: Callable[[Block, Tensor], Tensor]
) -> Tensor:
    """Show every rank's block to `visit` on every rank, its own first.

    The next block is under way while one is visited. What `visit` returns travels with the block
    that it was called for, to the next rank's `visit`, and is back home after the last.

    Args:
        carried: [n, …], what the own block carries at first.
    """
    world = len(ranks.sizes)
    block = own
    for hop in range(world):
        source = (ranks.index - hop) % world  # whose block is here
        following = ranks.sizes[(source - 1) % world]
        last = hop == world - 1
        arriving, waits = _exchange(() if last else _tensors(block), following, ranks)
        result = visit(block, carried)
        (carried,), more = _exchange((result,), following, ranks)
        for wait in (*waits, *more):
            wait.wait()
        if not last:
            block = _block(block, arriving)
    return carried


def _tensors(block: Block) -> tuple[Tensor, ...]:
    return tuple(x for x in (block.columns, block.norm, block.ids, block.terms) if x is not None)


def _block(like: Block, tensors: tuple[Tensor, ...]) -> Block:
    rest = iter(tensors)
    fields = [None if x is None else next(rest) for x in like[:4]]
    columns, norm, ids, terms = fields
    assert columns is not None
    assert norm is not None
    return Block(columns, norm, ids, terms, own=False)


def _exchange(
    tensors: tuple[Tensor, ...], rows: int, ranks: Ranks
) -> tuple[tuple[Tensor, ...], list[dist.Work]]:
    """Send to the next rank, receive as many rows as given from the one before; not awaited."""
    if not tensors:
        return (), []
    world = len(ranks.sizes)
    arriving = tuple(x.new_empty((rows, *x.shape[1:])) for x in tensors)
    to, from_ = (_global(ranks, (ranks.index + step) % world) for step in (1, -1))
    operations = []
    for sent, received in zip(tensors, arriving, strict=True):
        if sent.numel():
            operations.append(dist.P2POp(dist.isend, sent, to, ranks.group))
        if received.numel():
            operations.append(dist.P2POp(dist.irecv, received, from_, ranks.group))
    return arriving, dist.batch_isend_irecv(operations) if operations else []


def _global(ranks: Ranks, index: int) -> int:
    return index if ranks.group is None else dist.get_global_rank(ranks.group, index)
