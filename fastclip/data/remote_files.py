"""Shards on other machines: finding them, and the indices beside them."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastclip.data.remote import (
    HTTP,
    RemoteError,
    once,
    open_filesystem,
    persistently,
    protocol_of,
    shown,
)

logger = logging.getLogger("fastclip")

_THREADS = 16
"""That ask for files at a time; asking is waiting."""

_LISTED_FROM = 8
"""Files of one folder from which on it is listed once, rather than each asked for."""

_CONTENTS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "generation", "blob_id")
_TIMES = (
    "mtime",
    "modify",
    "modificationTime",
    "last_write_time",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "modified",
    "updated",
    "created",
)
"""What file systems call that which changes with a file's content, and with its time."""


@dataclass(frozen=True, order=True, repr=False)
class RemoteFile:
    """A file that was there when it was asked for."""

    address: str
    size: int = field(compare=False)
    """In bytes."""

    version: str = field(compare=False)
    """Changes with the content; "" where the other side says nothing of the kind."""

    identity: str = field(compare=False)
    """Of the address: where the version is the content's, without the query, which in a presigned
    address is another one every time."""

    @property
    def name(self) -> str:
        """Without folders."""
        return self.address.partition("?")[0].rpartition("/")[2]

    def __str__(self) -> str:
        return shown(self.address)

    __repr__ = __str__


Shard = Path | RemoteFile
"""A tar, here or elsewhere: both have a `name`, and `str` may be shown."""


def find_remote(names: Sequence[str]) -> list[RemoteFile]:
    """The shards meant by `names`: files, globs, or folders, of which all ``*.tar``.

    Raises:
        FileNotFoundError: one means nothing.
        ImportError: a package is missing, which the message names.
        ValueError: fsspec does not know the protocol, or a glob or folder is to be listed by http.
        RemoteError: what is there cannot be learnt.
    """
    filesystem, _ = open_filesystem(names[0])
    filesystem.invalidate_cache()  # of listings: this is asked anew
    _list_folders(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return [file for found in pool.map(_match, names) for file in found]


def find_index(shard: RemoteFile, suffix: str) -> RemoteFile | None:
    """The index beside `shard`, if there is one and it may be read.

    Raises:
        RemoteError: neither can be learnt.
    """
    base, mark, query = shard.address.partition("?")
    stem = base.removesuffix(".tar")
    try:
        return _look(f"{stem}{suffix}{mark}{query}")
    except RemoteError as error:
        if error.missing or error.denied:  # S3 denies what is not there to who may not list
            return None
        raise


def _list_folders(names: Iterable[str]) -> None:
    """Let fsspec keep the listings of folders of which many files are to be asked for."""
    counts = Counter(name.rpartition("/")[0] for name in names if protocol_of(name) not in HTTP)
    for folder, count in counts.items():
        if count >= _LISTED_FROM:
            try:
                once(folder, "ls", detail=True)
            except Exception as error:  # then each is asked for, and says what is wrong
                logger.debug("%s cannot be listed: %s", shown(folder), shown(str(error)))


def _match(name: str) -> list[RemoteFile]:
    http = protocol_of(name) in HTTP
    magic = any(mark in name for mark in ("*[" if http else "*[?"))
    if http and (magic or name.partition("?")[0].endswith("/")):
        raise ValueError(
            f"{shown(name)}: http lists no folders, so that neither one nor * and [ ] mean "
            "anything there: number the shards in braces, {00000..00042}.tar, or join them by ::"
        )
    name = name if http else name.rstrip("/")
    if magic:
        found: Mapping[str, Any] = _ask(name, "glob", detail=True)
        what = f"no file matches {shown(name)}"
    else:
        try:
            info = _ask(name, "info")
        except RemoteError as error:
            if not error.missing:
                raise
            raise FileNotFoundError(f"no file {shown(name)}") from None
        if info["type"] == "file":
            return [_file(name, info)]
        found = {i["name"]: i for i in _ask(name, "ls", detail=True) if i["name"].endswith(".tar")}
        what = f"the folder {shown(name)} holds no *.tar"
        name = f"{name}/*.tar"
    files = [_file(_address(p, name), i) for p, i in found.items() if i["type"] == "file"]
    if not files:
        raise FileNotFoundError(what)
    return files


def _address(path: str, pattern: str) -> str:
    """Of a path that the file system found for `pattern`: host and the like are the pattern's."""
    _, searched = open_filesystem(pattern)
    pairs = zip(reversed(searched), reversed(pattern), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return pattern[: len(pattern) - same] + path[len(searched) - same :]


def _look(address: str) -> RemoteFile:
    return _file(address, _ask(address, "info"))


def _file(address: str, info: Mapping[str, Any]) -> RemoteFile:
    if info["size"] is None:
        raise RemoteError(address, "its size is not said, so that no copy could be checked")
    for name in (*_CONTENTS, *_TIMES):
        if info.get(name):
            bare = address.partition("?")[0]
            identity = bare if name in _CONTENTS else address
            return RemoteFile(address, int(info["size"]), f"{name}={info[name]}", identity)
    return RemoteFile(address, int(info["size"]), "", address)


def _ask(address: str, method: str, **options: Any) -> Any:
    return persistently(address, lambda: once(address, method, **options))
