"""The order of samples: a pure function of (seed, epoch), with random access.

Every epoch visits each sample exactly once. Shards are permuted; within windows over the permuted
shards, so are samples (a set smaller than a window is permuted as a whole). A position in the
stream says everything there is to know about where training stands.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW = 16384
"""Samples permuted among each other."""

MOST_WEIGHT = 10_000
"""Places of a mixture's round."""

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """64 random bits that depend on all `values` (splitmix64's finaliser, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def uniform(*values: int) -> float:
    """A number in [0, 1) that depends on all `values`."""
    return (mix(*values) >> 11) * 2.0**-53


def permutation(count: int, *values: int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on all `values`, the same on every platform."""
    keys = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys += np.uint64(mix(*values))
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")


class Plan:
    """Sample numbers by place in the endless stream.

    Args:
        sizes: samples of each shard.
        seed: of the order.
        window: samples permuted among each other.
    """

    def __init__(self, sizes: list[int], seed: int, window: int = WINDOW) -> None:
        self.count = sum(sizes)
        if self.count == 0:
            raise ValueError("there is nothing to order: no shard has a sample")
        self.seed = seed
        self.window = window
        self._sizes = np.array(sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._windows: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()
        self._shards: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def __call__(self, position: int) -> tuple[int, int]:
        """(epoch, sample number) at `position` of the stream."""
        epoch, place = divmod(position, self.count)
        return epoch, int(self._window(epoch, place // self.window)[place % self.window])

    def shards(self, begin: int, end: int) -> list[int]:
        """Numbers of the shards that the windows hold in which places `begin` to `end` lie, in the
        order in which they come."""
        found: dict[int, None] = {}
        for epoch in range(begin // self.count, (end - 1) // self.count + 1):
            order, ends = self._epoch(epoch)
            first = max(begin - epoch * self.count, 0) // self.window * self.window
            last = -(-min(end - epoch * self.count, self.count) // self.window) * self.window
            span = np.searchsorted(ends, [first, min(last, self.count) - 1], side="right")
            numbers = order[span[0] : span[1] + 1]
            found |= dict.fromkeys(numbers[self._sizes[numbers] > 0].tolist())
        return list(found)

    def alike(self, number: int) -> tuple[int, int]:
        """First and number of the samples that may take the place of sample `number`."""
        del number
        return 0, self.count

    def _window(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Sample numbers of one window, in the epoch's order."""
        cached = self._windows.get((epoch, number))
        if cached is not None:
            return cached
        order, ends = self._epoch(epoch)
        first = number * self.window
        size = min(self.window, self.count - first)
        places = first + permutation(size, self.seed, epoch, 1, number)
        shards = np.searchsorted(ends, places, side="right")
        within = places - (ends[shards] - self._sizes[order[shards]])
        samples = self._starts[order[shards]] + within
        self._windows[epoch, number] = samples
        if len(self._windows) > 4:
            self._windows.popitem(last=False)
        return samples

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Order of the shards, and the cumulative sizes in that order."""
        if epoch not in self._shards:
            order = permutation(len(self._sizes), self.seed, epoch, 0)
            self._shards[epoch] = (order, np.cumsum(self._sizes[order]))
            if len(self._shards) > 4:
                self._shards.popitem(last=False)
        return self._shards[epoch]


class Mixture:
    """Several sources in one stream, in exact proportions.

    The stream is cut into rounds of as many places as the weights add up to; in every round each
    source has as many as its weight says, in a random order. Each source goes through its own
    samples as `Plan` says, over and over.

    Args:
        sources: sizes of each source's shards.
        weights: of the sources, whole numbers.
        seed: of all orders.
    """

    def __init__(self, sources: list[list[int]], weights: tuple[int, ...], seed: int) -> None:
        if len(sources) != len(weights) or min(weights) < 1:
            raise ValueError(f"{len(sources)} sources need as many positive weights, not {weights}")
        self.seed = seed
        self.count = sum(map(sum, sources))
        self._plans = [Plan(sizes, mix(seed, 8, number)) for number, sizes in enumerate(sources)]
        self._firsts = np.cumsum([0, *(plan.count for plan in self._plans)]).tolist()
        self._first_shards = np.cumsum([0, *map(len, sources)]).tolist()
        divisor = math.gcd(*weights)
        self._weights = [weight // divisor for weight in weights]
        if sum(self._weights) > MOST_WEIGHT:
            raise ValueError(
                f"the weights {weights} add up to more than {MOST_WEIGHT:,}, which is how exact "
                "proportions are kept: give smaller ones, near to these"
            )
        self._owners = np.repeat(np.arange(len(weights)), self._weights)
        self._before = np.concatenate([np.arange(weight) for weight in self._weights])
        self._round: tuple[int, list[int], list[int]] = (-1, [], [])

    def __call__(self, position: int) -> tuple[int, int]:
        """(epoch of its source, sample number over all sources) at `position` of the stream."""
        turn, place = divmod(position, len(self._owners))
        if self._round[0] != turn:
            owners = self._owners[permutation(len(self._owners), self.seed, 9, turn)]
            before = np.empty_like(owners)
            before[np.argsort(owners, kind="stable")] = self._before
            self._round = (turn, owners.tolist(), before.tolist())
        _, owners, earlier = self._round
        source, before = owners[place], earlier[place]
        epoch, number = self._plans[source](turn * self._weights[source] + before)
        return epoch, self._firsts[source] + number

    def alike(self, number: int) -> tuple[int, int]:
        """First and number of the samples of the source that sample `number` is of."""
        source = bisect.bisect_right(self._firsts, number) - 1
        return self._firsts[source], self._plans[source].count

    def check(self, batch: int, names: Sequence[str]) -> None:
        """Refuse batches for which a source, of these names, is too small.

        Raises:
            ValueError: some of its samples would be twice in one.
        """
        turns = -(-(batch - 1) // len(self._owners)) + 1
        for name, plan, weight in zip(names, self._plans, self._weights, strict=True):
            most = min(turns * weight, batch)
            if most > plan.count:
                raise ValueError(
                    f"{name} has {plan.count} usable pairs, and of a global batch of {batch} up to "
                    f"{most} are its by data.weights, so that pairs would be their own negatives: "
                    "set a smaller batch or weight"
                )

    def shards(self, begin: int, end: int) -> list[int]:
        """As `Plan.shards`, over all sources' shards, each source's next ones in turn."""
        turns = begin // len(self._owners), -(-end // len(self._owners))
        lists = [
            [first + shard for shard in plan.shards(turns[0] * weight, turns[1] * weight)]
            for plan, weight, first in zip(
                self._plans, self._weights, self._first_shards, strict=False
            )
        ]
        rows = itertools.zip_longest(*lists)
        return [shard for row in rows for shard in row if shard is not None]
