"""Collectives over an explicit process group.

``group=None`` means the default group when torch.distributed is initialised, and a single process
otherwise. Every rank of the group calls, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def world_size(group: ProcessGroup | None = None) -> int:
    """Ranks in the group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """This process's rank in the group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def barrier(group: ProcessGroup | None = None) -> None:
    """Wait until every rank is here."""
    if world_size(group) > 1:
        dist.barrier(group)


def all_gather_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Small picklable values of all ranks, by rank."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def broadcast_object(value: Any, group: ProcessGroup | None = None) -> Any:
    """Rank 0's small picklable value, on every rank."""
    if world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def any_rank(flag: bool, group: ProcessGroup | None = None) -> bool:
    """True on every rank when `flag` is true on one."""
    return any(all_gather_objects(flag, group))


def all_gather_integers(
    values: list[int], device: torch.device, group: ProcessGroup | None = None
) -> list[list[int]]:
    """A few whole numbers of every rank, by rank; the host waits for them."""
    if world_size(group) == 1:
        return [values]
    own = torch.tensor(values, dtype=torch.int64, device=device)
    everyone = own.new_empty(world_size(group) * len(values))
    dist.all_gather_into_tensor(everyone, own, group)
    return everyone.view(-1, len(values)).tolist()


def all_gather_rows(x: Tensor, sizes: list[int], group: ProcessGroup | None = None) -> Tensor:
    """Rows of all ranks below each other, [sum of sizes, ...].

    Args:
        x: [sizes[rank], ...].
        sizes: rows of each rank, known to all; 0 is allowed.
    """
    ranks = world_size(group)
    if ranks == 1:
        return x
    most = max(sizes)
    padded = x.contiguous()
    if x.shape[0] < most:
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: x.shape[0]] = x
    gathered = x.new_empty((ranks * most, *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, padded, group)
    if min(sizes) == most:
        return gathered
    parts = gathered.split(most)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatter_rows(x: Tensor, sizes: list[int], group: ProcessGroup | None = None) -> Tensor:
    """Sum `x` [sum b_r, ...] over ranks; each rank gets its own b_r rows of the sum."""
    ranks = world_size(group)
    if ranks == 1:
        return x
    most = max(sizes)
    padded = x.contiguous()
    if min(sizes) < most:
        padded = x.new_zeros((ranks * most, *x.shape[1:]))
        for index, part in enumerate(x.split(sizes)):
            padded[index * most : index * most + part.shape[0]] = part
    own = x.new_empty((most, *x.shape[1:]))
    dist.reduce_scatter_tensor(own, padded, group=group)
    return own[: sizes[rank(group)]]


def all_reduce_sum(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum over ranks; not differentiable."""
    if world_size(group) == 1:
        return x
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total
