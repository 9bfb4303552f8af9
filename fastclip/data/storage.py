"""Bytes of shards, whose files stay open for a while."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Collection

from fastclip.data.decode import BadSampleError
from fastclip.data.remote import RemoteError
from fastclip.data.remote_files import RemoteFile, Shard
from fastclip.data.shard_cache import forget_failures, open_shard
from fastclip.data.tar_members import ChangedError, Place, read_members

_OPEN_FILES = 64
_UNUSED = 60.0
"""Seconds after which a remote shard's copy that was removed is closed: only then its bytes are
free, and it was probably read through."""


class _File:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, shard: Shard) -> None:
        self.descriptor = open_shard(shard)
        self.used = time.monotonic()
        weakref.finalize(self, os.close, self.descriptor)

    def is_over(self) -> bool:
        """Whether it was removed and is not read any more."""
        unused = time.monotonic() - self.used > _UNUSED
        return unused and os.fstat(self.descriptor).st_nlink == 0


class ShardFiles:
    """Reads members of shards. For any number of threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[Shard, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: Shard, places: tuple[Place, Place, Place]) -> tuple[bytes, bytes, bytes]:
        """The members at `places`, (offset, size) in bytes each; nothing for an offset of -1.

        Raises:
            BadSampleError: the shard is not readable, or has something else there than it had when
                it was indexed.
            ValueError: there is no room for a copy of a remote one.
        """
        try:
            file = self._file(shard)
            return read_members(file.descriptor, places)
        except ChangedError as error:
            raise BadSampleError("unreadable", f"{shard} {error} when it was indexed") from None
        except RemoteError as error:
            raise BadSampleError("unreadable", str(error)) from None
        except OSError as error:
            raise BadSampleError("unreadable", f"{shard}: {error.strerror}") from None

    def forget(self, shards: Collection[Shard]) -> None:
        """Open these anew when they are read again: there may be other files of their names."""
        forget_failures()
        with self._lock:
            for shard in self._open.keys() & set(shards):
                del self._open[shard]

    def _file(self, shard: Shard) -> _File:
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                file.used = time.monotonic()
                self._open.move_to_end(shard)
                return file
        opened = _File(shard)  # without the lock: a remote one may have to be fetched
        with self._lock:
            file = self._open.setdefault(shard, opened)
            remote = [other for other in self._open if isinstance(other, RemoteFile)]
            for other in remote:
                if self._open[other].is_over():
                    del self._open[other]
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return file


FILES = ShardFiles()
"""This process's."""
