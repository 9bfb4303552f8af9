"""Local copies of remote shards and their indices, shared by all processes of a machine.

A copy is a file in a folder of its own, named after the remote file's address and version: one that
is stale is simply not found any more. Beside it lie a lock, which the process that fetches it
holds, and what has come so far. The copies used longest ago make room for others; who has one open
goes on reading it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from fastclip.data.remote import (
    RemoteError,
    StoppedError,
    once,
    pause,
    persistently,
    settings,
    stop_with,
)
from fastclip.data.remote_files import RemoteFile, Shard, find_index
from fastclip.data.shard_table import (
    INDEX_SUFFIX,
    ShardTable,
    Summary,
    index_path,
    load_summary,
    load_table,
    save_table,
    scan_shard,
)

logger = logging.getLogger("fastclip")

_LOCK = ".lock"
_COMING = ".coming"
_FOLDER = re.compile("[0-9a-f]{32}")
"""Of a copy: `copy_path` makes such names."""

_FAILURE_LASTS = 60.0
"""Seconds for which a file that could not be fetched is not asked for again."""

_PREFETCHES = 4
"""Shards that a process fetches ahead at a time."""

_started = time.time()


def forget_failures() -> None:
    """Ask again for what could not be fetched before."""
    global _started
    _started = time.time()


def size_of(shard: Shard) -> int:
    """In bytes. Raises OSError: a local one is not there."""
    return shard.size if isinstance(shard, RemoteFile) else shard.stat().st_size


def open_shard(shard: Shard) -> int:
    """A descriptor of the shard, a remote one's of its copy; fetched first if need be.

    Raises:
        OSError: it cannot be read or fetched; or what failed less than a minute ago.
        ValueError: the cache is too small or its disk full.
    """
    if not isinstance(shard, RemoteFile):
        return os.open(shard, os.O_RDONLY)
    while True:
        copy = fetch(shard)
        with contextlib.suppress(FileNotFoundError):  # another process has just made room
            return os.open(copy, os.O_RDONLY)


def index_places(shard: Shard) -> Iterator[Path]:
    """What `load_summary` and `load_table` may find the shard's index by, the likeliest first.

    A remote shard's are the copy of the index beside it, and the one that was made here for lack of
    such a one, whether or not a copy of the shard is still here.

    Raises:
        OSError: what lies beside a remote shard can be neither fetched nor known to be absent.
        ValueError: see `fetch`.
    """
    if not isinstance(shard, RemoteFile):
        yield shard
        return
    _check_size(shard)  # now, rather than when it is read
    index = find_index(shard, INDEX_SUFFIX)
    if index is not None:
        yield fetch(index)
    yield index_path(copy_path(shard))


def walk(shard: Shard) -> tuple[Summary, ShardTable]:
    """As `scan_shard`; a remote shard's copy, once for all processes: the index is kept.

    Raises:
        OSError, ValueError: it cannot be read; or see `fetch`.
    """
    if not isinstance(shard, RemoteFile):
        return scan_shard(shard)
    while True:
        with contextlib.suppress(FileNotFoundError):  # another process has just made room
            known = load_summary(copy_path(shard))
            if known is not None:
                return known, load_table(copy_path(shard))
            copy = fetch(shard)
            found = scan_shard(copy)
            with contextlib.suppress(OSError):
                save_table(copy, *found)
            return found


def copy_path(file: RemoteFile) -> Path:
    """Where the copy of `file` is, or would be."""
    known = f"{file.identity}\n{file.size}\n{file.version}"
    key = hashlib.blake2b(known.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return settings().cache_dir / key / file.name


def fetch(file: RemoteFile, *, wait: bool = True) -> Path:
    """The path of a whole copy of `file`, which may make room for others as soon as it is not open.

    Args:
        wait: for another thread or process that is fetching it; if not, there may be no copy yet.

    Raises:
        RemoteError: it cannot be fetched, or could not less than a minute ago.
        ValueError: the cache is too small for it, or its disk is full.
        StoppedError: see `stop_with`.
    """
    copy = copy_path(file)
    if _is_there(copy, file):
        return copy
    _check_size(file)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with _locked(copy.parent / _LOCK, wait) as lock:
        if lock is None or _is_there(copy, file):
            return copy
        _raise_known_failure(file, lock)
        for rest in copy.parent.glob(f"*{_COMING}"):  # of a process that was killed
            rest.unlink(missing_ok=True)
        try:
            persistently(file.address, lambda: _download(file, copy))
        except RemoteError as error:
            lock.truncate(0)
            lock.write(error.reason.encode("utf-8", "replace"))
            raise
        lock.truncate(0)
    return copy


def _check_size(file: RemoteFile) -> None:
    if file.size > settings().cache_bytes:
        raise ValueError(
            f"{file} has {file.size / 1e9:.3g} GB, and data.cache_gigabytes="
            f"{settings().cache_bytes / 1e9:.3g} holds no copy of it: set it to several times more"
        )


def _is_there(copy: Path, file: RemoteFile) -> bool:
    try:
        if copy.stat().st_size != file.size:
            return False
        os.utime(copy)  # the time of its last use
        return True
    except FileNotFoundError:
        return False


def _raise_known_failure(file: RemoteFile, lock: BinaryIO) -> None:
    """Which another thread or process may have met: each trying anew would hold up all of them."""
    status = os.fstat(lock.fileno())
    if status.st_size and status.st_mtime > max(_started, time.time() - _FAILURE_LASTS):
        lock.seek(0)
        raise RemoteError(file.address, lock.read().decode())


def _download(file: RemoteFile, copy: Path) -> None:
    partial = copy.parent / f"{file.size}.{uuid.uuid4().hex}{_COMING}"
    try:
        _make_room(file.size, partial)
        once(file.address, "get_file", str(partial), progress=lambda: _size(partial))
        if (size := _size(partial)) != file.size:
            raise RemoteError(file.address, f"{size} bytes came, and it had {file.size}")
        os.replace(partial, copy)
    finally:
        partial.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _make_room(size: int, partial: Path) -> None:
    """Remove the copies used longest ago until `size` more bytes fit, and reserve them."""
    cache = settings().cache_dir
    with _locked(cache / _LOCK):
        used, found = 0, []
        for folder in os.scandir(cache):
            # Whatever else lies there is somebody's.
            own = _FOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False)
            for entry in os.scandir(folder) if own else ():
                if entry.name == _LOCK:
                    continue
                path = Path(entry)
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if path.suffix != _COMING:
                    # Indices are small, and needed at every start: they go last.
                    found.append((path.suffix == INDEX_SUFFIX, status.st_mtime, path, status))
                    used += status.st_size
                elif _is_orphan(path):
                    path.unlink(missing_ok=True)
                else:
                    used += int(path.name.partition(".")[0])  # as many as will come
        excess = max(used + size - settings().cache_bytes, size - shutil.disk_usage(cache).free)
        for _, _, path, status in sorted(found):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= status.st_size
        partial.touch()


def _is_orphan(partial: Path) -> bool:
    with _locked(partial.parent / _LOCK, wait=False) as lock:
        return lock is not None


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[BinaryIO | None]:
    """Hold a lock against other threads and processes; None, without it, where `wait` is not set.

    It goes with the process that holds it, however that ends.
    """
    with path.open("a+b") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield None
                    return
                pause(0.02)
                continue
            try:
                yield file
            finally:  # said, as a child forked meanwhile has the file open, too
                file.flush()
                fcntl.flock(file, fcntl.LOCK_UN)
            return


class Prefetcher:
    """Fetches remote shards before they are read, in threads of its own.

    Args:
        shards: those that its calls number.
        stop: ends what is under way.
    """

    def __init__(self, shards: Sequence[Shard], stop: threading.Event) -> None:
        self._shards = shards
        self._last: list[int] = []
        self._warned = False
        self._pool = ThreadPoolExecutor(
            _PREFETCHES, "fastclip-prefetch", initializer=stop_with, initargs=(stop,)
        )

    def __call__(self, numbers: list[int]) -> None:
        """Begin to fetch these shards, which will be read soon, in this order."""
        if numbers == self._last:
            return
        self._last = numbers
        soon = [self._shards[number] for number in numbers]
        remote = [shard for shard in soon if isinstance(shard, RemoteFile)]
        room = settings().cache_bytes
        for shard in remote:
            room -= shard.size
            if room < 0:  # one more would take the place of one of these
                self._warn(remote)
                return
            self._pool.submit(_prefetch, shard)

    def _warn(self, remote: list[RemoteFile]) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "data.cache_gigabytes=%.3g is less than the %.3g GB of the %d shard(s) that are "
                "read at a time and next: they are not all fetched ahead, and some perhaps twice",
                settings().cache_bytes / 1e9,
                sum(shard.size for shard in remote) / 1e9,
                len(remote),
            )

    def close(self) -> None:
        """Wait until the threads have stopped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _prefetch(shard: RemoteFile) -> None:
    # Who reads it meets an error again, and says so.
    with contextlib.suppress(OSError, StoppedError, ValueError):
        fetch(shard, wait=False)
