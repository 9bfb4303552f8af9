"""Bytes of shards: open files kept, one read for a sample whose members lie side by side."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path

from fastclip.data.decode import BadSampleError
from fastclip.data.tar import BLOCK, SIZE_FIELD, size_in

_OPEN_FILES = 64
_GAP = 16 * BLOCK
"""Bytes between two members that are read rather than skipped."""
_NOTHING = memoryview(b"")


class _File:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


class ShardFiles:
    """Reads members of shards. For any number of threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: Path, places: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The members at `places`, (offset, size) in bytes each; nothing for an offset of -1.

        Raises:
            BadSampleError: the shard is not readable, or has something else there than it had when
                it was indexed.
        """
        there = [place for place in places if place[0] >= 0]
        if not there:
            return [_NOTHING for _ in places]
        begin = min(there)[0] - BLOCK
        end = max(offset + size for offset, size in there)
        try:
            file = self._file(shard)
            if end - begin <= sum(size + BLOCK for _, size in there) + _GAP:
                block = _read(file, begin, end - begin)
                return [_member(shard, block, begin, place) for place in places]
            return [_member_alone(shard, file, place) for place in places]
        except OSError as error:
            raise BadSampleError("unreadable", f"{shard}: {error.strerror}") from None

    def forget(self, shards: Collection[Path]) -> None:
        """Open these anew when they are read again: there may be other files of their names."""
        with self._lock:
            for shard in self._open.keys() & set(shards):
                del self._open[shard]

    def _file(self, shard: Path) -> _File:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                file = self._open[shard] = _File(shard)
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
            return file


def _read(file: _File, begin: int, length: int) -> memoryview:
    parts = []
    while length:  # a call reads 2 GiB at most
        part = os.pread(file.descriptor, length, begin)
        if not part:
            break
        parts.append(part)
        begin, length = begin + len(part), length - len(part)
    return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


def _member_alone(shard: Path, file: _File, place: tuple[int, int]) -> memoryview:
    offset, size = place
    begin = offset - BLOCK
    block = _read(file, begin, size + BLOCK) if offset >= 0 else _NOTHING
    return _member(shard, block, begin, place)


def _member(shard: Path, block: memoryview, begin: int, place: tuple[int, int]) -> memoryview:
    """A member out of a shard's bytes from `begin` on, if its header still says its size."""
    offset, size = place
    if offset < 0:
        return _NOTHING
    start = offset - begin
    if len(block) < start + size:
        raise BadSampleError("unreadable", f"{shard} is shorter than it was when indexed")
    header = start - BLOCK
    if size_in(bytes(block[header + SIZE_FIELD.start : header + SIZE_FIELD.stop])) != size:
        raise BadSampleError("unreadable", f"{shard} is not what it was when indexed")
    return block[start : start + size]


FILES = ShardFiles()
"""This process's."""
