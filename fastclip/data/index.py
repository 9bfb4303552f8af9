"""What is in the shards: samples by number, and never silent about what cannot be used."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastclip.data.remote import shown, stop_with
from fastclip.data.remote_files import RemoteFile, Shard
from fastclip.data.shard_cache import copy_path, index_places, size_of, walk
from fastclip.data.shard_table import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    METADATA_EXTENSION,
    Problem,
    ShardTable,
    Summary,
    index_path,
    load_summary,
    load_table,
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
_QUICK_SECONDS = 0.0005
"""To open a shard's index on a disk of this machine, with some to spare."""
_REMOTE_THREADS = 32
_TABLES_KEPT = 64
"""Of those that can be read again: more than the shards among which samples are permuted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one sample's members lie in its shard; (offset, size) in bytes, (-1, 0) if absent."""

    shard: Shard
    key: str
    image: tuple[int, int]
    caption: tuple[int, int]
    metadata: tuple[int, int]
    extension: str
    """The image's, in small letters."""


class _Shard:
    """One shard, its table at hand or in the index beside it."""

    def __init__(self, path: Shard) -> None:
        self.path = path
        self.lock = threading.Lock()
        """Of the table, while it is made or loaded."""
        self.stale = False
        self.scanned: ShardTable | None = None
        self.known, self._place = self._find()
        self.bare = isinstance(path, RemoteFile) and self._place in (
            None,
            index_path(copy_path(path)),
        )
        """Whether it had to be fetched to be known."""

    @cached_property
    def summary(self) -> Summary:
        if self.known is not None:
            return self.known
        summary, self.scanned = walk(self.path)
        return summary

    def table(self) -> ShardTable:
        if self.scanned is not None:
            return self.scanned
        if self._place is not None:
            try:
                return load_table(self._place)
            except FileNotFoundError:
                if not isinstance(self.path, RemoteFile):
                    return self._walked()  # it was removed meanwhile
        _, self._place = self._find()  # the copy has made room for others
        return self._walked() if self._place is None else load_table(self._place)

    def _walked(self) -> ShardTable:
        summary, table = walk(self.path)
        if summary.digest != self.summary.digest:
            raise ValueError(f"{self.path} is not what it was when the run began")
        return table

    def _find(self) -> tuple[Summary | None, Path | None]:
        """What is known, and the place of the index that says it."""
        for place in index_places(self.path):
            try:
                summary = load_summary(place)
            except ValueError as error:
                if place is self.path:
                    raise
                # Some servers answer every request, with a page.
                logger.warning("the index beside %s is none, and not used: %s", self.path, error)
                continue
            if summary is not None and summary.tar_bytes == size_of(self.path):
                return summary, place
            self.stale = self.stale or summary is not None
        return None, None


class ShardIndex:
    """The usable samples of a list of shards, in the shards' order. For any number of threads.

    Attributes:
        shards: the files; `fastclip.data.storage.FILES` reads them wherever they are.
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

    def stub(self, number: int) -> Sample:
        """What may be said of a sample without its shard's table: the shard."""
        shard = self.shards[bisect.bisect_right(self._ends, number)]
        nowhere = (-1, 0)
        return Sample(shard, f"sample {number}", nowhere, nowhere, nowhere, "")

    def numbers(self, shard: int) -> range:
        """Of the samples in one shard."""
        return range(self._ends[shard] - self.sizes[shard], self._ends[shard])

    def source_sizes(self) -> list[list[int]]:
        """`sizes`, source by source."""
        ends = list(itertools.accumulate(self.sources))
        return [self.sizes[end - n : end] for end, n in zip(ends, self.sources, strict=True)]

    def _table(self, shard: int) -> tuple[ShardTable, NDArray[np.int64]]:
        found = self._kept(shard)
        if found is not None:
            return found
        with self._shards[shard].lock:  # the others' tables are read meanwhile
            found = self._kept(shard)
            if found is None:
                table = self._shards[shard].table()
                found = table, table.usable(self.needs)
                if len(found[1]) != self.sizes[shard]:
                    raise ValueError(
                        f"the index of {self.shards[shard]} contradicts itself: make it anew with "
                        "fastclip data index"
                    )
                with self._lock:
                    self._tables[shard] = found
                    while len(self._tables) > _TABLES_KEPT:
                        self._tables.popitem(last=False)
            return found

    def _kept(self, shard: int) -> tuple[ShardTable, NDArray[np.int64]] | None:
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
            return self._tables.get(shard)

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
        if bare := [shard.path for shard in self._shards if shard.bare]:
            logger.warning(
                "%d of %d remote shard(s) have no index beside them (first: %s), and had to be "
                "fetched whole to be looked through: run fastclip data index where they lie, and "
                "keep the .fcidx files beside them",
                len(bare),
                sum(isinstance(path, RemoteFile) for path in self.shards),
                bare[0],
            )
        for problem in self.problems:
            logger.warning("%s", problem)
        if self.problems:
            counts = Counter(problem.kind for problem in self.problems)
            listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            logger.warning("left out of %d shard(s): %s", len(self.shards), listed)


def _open_all(shards: list[Shard]) -> list[_Shard]:
    """In a few threads, for disks that answer slowly, each with many shards at a time."""
    remote = any(isinstance(shard, RemoteFile) for shard in shards)
    length = 1 if remote else _SHARDS_AT_A_TIME
    found = [] if remote else _open_quick_ones(shards)
    parts = [shards[first : first + length] for first in range(len(found), len(shards), length)]
    stop = threading.Event()
    workers = _REMOTE_THREADS if remote else 8
    with ThreadPoolExecutor(workers, initializer=stop_with, initargs=(stop,)) as pool:
        try:
            opened = pool.map(lambda part: [_Shard(path) for path in part], parts)
            found += [shard for part in opened for shard in part]
            unknown = [shard for shard in found if shard.known is None]
            if remote and unknown:
                logger.info("fetching and looking through %d shard(s) without index", len(unknown))
            parts = [unknown[first : first + length] for first in range(0, len(unknown), length)]
            list(pool.map(lambda part: [shard.summary for shard in part], parts))
        finally:  # one that fails, or an interrupt, need not wait for the others
            stop.set()
    return found


def _open_quick_ones(shards: list[Shard]) -> list[_Shard]:
    """All whose disk answers at once, for which threads would wait for each other more than for it;
    the first of them where it does not."""
    opened: list[_Shard] = []
    begin = time.perf_counter()
    for shard in shards:
        opened.append(_Shard(shard))
        few = len(opened) < _SHARDS_AT_A_TIME
        if not few and time.perf_counter() - begin > _QUICK_SECONDS * len(opened):
            break
    return opened


def index_shards(pattern: str, *, needs: tuple[str, ...] = (CAPTION_EXTENSION,)) -> ShardIndex:
    """Index the shards meant by `pattern` (see `expand_shards`).

    An index file beside a shard is used; other shards are walked now, which remote ones are
    fetched for.

    Args:
        needs: members that a sample must have beside its image, "txt" or "json".

    Raises:
        FileNotFoundError, ImportError, ValueError: see `expand_shards`; or not one sample is
            usable, an index file is damaged, or the cache is too small.
        OSError: a shard cannot be read or fetched.
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
            f"{shown(pattern)}: {len(count)} shard(s), and no usable sample ({wanted} with one "
            f"key).{first}"
        )
    return index
