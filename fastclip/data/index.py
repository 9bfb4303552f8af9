"""What is in the shards: samples by number, and never silent about what cannot be used."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastclip.data.shard_table import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    METADATA_EXTENSION,
    Problem,
    ShardTable,
    Summary,
    load_summary,
    load_table,
    scan_shard,
)
from fastclip.data.shards import expand_shards
from fastclip.data.storage import FILES

__all__ = [
    "CAPTION_EXTENSION",
    "METADATA_EXTENSION",
    "Problem",
    "Sample",
    "ShardIndex",
    "index_shards",
    "index_sources",
]

logger = logging.getLogger("fastclip")

_SHARDS_AT_A_TIME = 32
_TABLES_KEPT = 64
"""Of those that can be read again: more than the shards among which samples are permuted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one sample's members lie in its shard; (offset, size) in bytes, (-1, 0) if absent."""

    shard: Path
    key: str
    image: tuple[int, int]
    caption: tuple[int, int]
    metadata: tuple[int, int]
    extension: str
    """The image's, in small letters."""


class _Shard:
    """One shard, its table at hand or in the index beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stale = False
        summary = load_summary(path)
        if summary is not None and summary.tar_bytes != path.stat().st_size:
            self.stale, summary = True, None
        self.scanned: ShardTable | None = None
        if summary is None:
            summary, self.scanned = scan_shard(path)
        self.summary: Summary = summary

    def table(self) -> ShardTable:
        return self.scanned if self.scanned is not None else load_table(self.path)


class ShardIndex:
    """The usable samples of a list of shards, in the shards' order. For any number of threads.

    Attributes:
        shards: the files.
        needs: members that a sample must have beside its image.
        sizes: usable samples of each shard.
        sources: shards of each source.
        hash: changes when shards, samples or their places change.
    """

    def __init__(
        self, shards: list[_Shard], needs: tuple[str, ...], sources: list[int] | None = None
    ) -> None:
        self.sources = [len(shards)] if sources is None else sources
        self.shards = [shard.path for shard in shards]
        self.needs = tuple(sorted(needs))
        self.sizes = [shard.summary.count(self.needs) for shard in shards]
        self._shards = shards
        self._ends = list(itertools.accumulate(self.sizes))
        self._tables: OrderedDict[int, tuple[ShardTable, NDArray[np.int64]]] = OrderedDict()
        self._lock = threading.Lock()
        digest = hashlib.blake2b(digest_size=8)
        known = [(shard.path.name, shard.summary.digest) for shard in shards]
        digest.update(repr((self.needs, known)).encode("utf-8", "surrogateescape"))
        self.hash = digest.hexdigest()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Sample:
        shard = bisect.bisect_right(self._ends, number)
        table, usable = self._table(shard)
        row = usable[number - self._ends[shard] + self.sizes[shard]]
        a, b, c, d, e, f = table.places[row].tolist()
        extension = IMAGE_EXTENSIONS[table.extensions[row]]
        return Sample(self.shards[shard], table.keys[row], (a, b), (c, d), (e, f), extension)

    def source_sizes(self) -> list[list[int]]:
        """`sizes`, source by source."""
        ends = list(itertools.accumulate(self.sources))
        return [self.sizes[end - n : end] for end, n in zip(ends, self.sources, strict=True)]

    def _table(self, shard: int) -> tuple[ShardTable, NDArray[np.int64]]:
        with self._lock:
            found = self._tables.get(shard)
            if found is None:
                table = self._shards[shard].table()
                found = table, table.usable(self.needs)
                if len(found[1]) != self.sizes[shard]:
                    raise ValueError(
                        f"the index of {self.shards[shard]} contradicts itself: make it anew with "
                        "fastclip data index"
                    )
                self._tables[shard] = found
            self._tables.move_to_end(shard)
            while len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
            return found

    @cached_property
    def problems(self) -> list[Problem]:
        """Everything that was left out, and why."""
        found = []
        for shard in self._shards:
            summary = shard.summary
            found += summary.problems
            if summary.samples > summary.count(self.needs):
                table = shard.table()
                found += table.lacking(shard.path.name, self.needs, summary.cut_key)
        return found

    def log_problems(self) -> None:
        """Say once what was left out: each problem by name, and the counts."""
        if stale := [shard.path for shard in self._shards if shard.stale]:
            logger.warning(
                "%d index file(s) are of other shards than lie there now, and were not used "
                "(first: %s): run fastclip data index",
                len(stale),
                stale[0],
            )
        for problem in self.problems:
            logger.warning("%s", problem)
        if self.problems:
            counts = Counter(problem.kind for problem in self.problems)
            listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            logger.warning("left out of %d shard(s): %s", len(self.shards), listed)


def _open_all(shards: list[Path]) -> list[_Shard]:
    """In a few threads, for disks that answer slowly, each with many shards at a time."""
    parts = [
        shards[first : first + _SHARDS_AT_A_TIME]
        for first in range(0, len(shards), _SHARDS_AT_A_TIME)
    ]
    with ThreadPoolExecutor(8) as pool:
        opened = pool.map(lambda part: [_Shard(path) for path in part], parts)
        return [shard for part in opened for shard in part]


def index_shards(pattern: str, *, needs: tuple[str, ...] = (CAPTION_EXTENSION,)) -> ShardIndex:
    """Index the shards meant by `pattern` (see `expand_shards`).

    An index file beside a shard is used; other shards are walked now.

    Args:
        needs: members that a sample must have beside its image, "txt" or "json".

    Raises:
        FileNotFoundError, ValueError: see `expand_shards`; or not one sample is usable, or an index
            file is damaged.
    """
    return index_sources([pattern], needs=needs)


def index_sources(
    patterns: Sequence[str], *, needs: tuple[str, ...] = (CAPTION_EXTENSION,)
) -> ShardIndex:
    """Index several lists of shards, one after the other; arguments and errors as `index_shards`.

    The index's `sources` says how many shards each list has.
    """
    lists = [expand_shards(pattern) for pattern in patterns]
    shards = [shard for one in lists for shard in one]
    FILES.forget(shards)
    index = ShardIndex(_open_all(shards), needs, [len(one) for one in lists])
    for pattern, count in zip(patterns, index.source_sizes(), strict=True):
        if sum(count):
            continue
        first = f" First: {index.problems[0]}" if index.problems else ""
        wanted = " and ".join(("an image", *needs))
        raise ValueError(
            f"{pattern}: {len(count)} shard(s), and no usable sample ({wanted} with one key)."
            f"{first}"
        )
    return index
