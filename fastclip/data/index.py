"""What is in the shards: one walk over the tar headers, never silent about what it cannot use.

Only headers are read. A damaged header costs its own sample: the walk goes on at the next block
that is a valid header, where tarfile (and webdataset) would drop the rest of the shard unsaid.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastclip.data.shards import expand_shards

logger = logging.getLogger("fastclip")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_EXTENSION = "txt"
METADATA_EXTENSION = "json"
_BLOCK = 512
_ABSENT = (-1, 0)


@dataclass(frozen=True)
class Problem:
    """Something in a shard that cannot be used."""

    shard: str
    key: str
    kind: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.shard}: {self.key}" if self.key else self.shard
        return f"{where}: {self.kind}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """Where one sample's members lie in its shard; (offset, size) in bytes, (-1, 0) if absent."""

    shard: Path
    key: str
    image: tuple[int, int]
    caption: tuple[int, int]
    metadata: tuple[int, int]


class ShardIndex:
    """The usable samples of a list of shards, in the shards' order.

    Attributes:
        shards: the files.
        sizes: usable samples of each shard.
        problems: everything that was left out, and why.
        hash: changes when shards, samples or their places change.
    """

    def __init__(
        self,
        shards: list[Path],
        samples: list[list[tuple[str, list[int]]]],
        problems: list[Problem],
    ) -> None:
        self.shards = shards
        self.sizes = [len(rows) for rows in samples]
        self.problems = problems
        self._keys = [key for rows in samples for key, _ in rows]
        places = [place for rows in samples for _, place in rows]
        self._places: NDArray[np.int64] = np.array(places, dtype=np.int64).reshape(-1, 6)
        self._ends = np.cumsum(self.sizes)
        digest = hashlib.blake2b(digest_size=8)
        digest.update(
            repr([(path.name, n) for path, n in zip(shards, self.sizes, strict=True)]).encode()
        )
        digest.update(self._places.tobytes())
        self.hash = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        place = [int(n) for n in self._places[index]]
        return Sample(
            self.shards[shard],
            self._keys[index],
            (place[0], place[1]),
            (place[2], place[3]),
            (place[4], place[5]),
        )

    def log_problems(self) -> None:
        """Say once what was left out: each problem by name, and the counts."""
        for problem in self.problems:
            logger.warning("%s", problem)
        if self.problems:
            counts = Counter(problem.kind for problem in self.problems)
            listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            logger.warning("left out of %d shard(s): %s", len(self.shards), listed)


def index_shards(pattern: str, *, needs: tuple[str, ...] = (CAPTION_EXTENSION,)) -> ShardIndex:
    """Index the shards meant by `pattern` (see `expand_shards`).

    Args:
        needs: members that a sample must have beside its image, "txt" or "json".

    Raises:
        FileNotFoundError, ValueError: see `expand_shards`; or not one sample is usable.
    """
    shards = expand_shards(pattern)
    with ThreadPoolExecutor(8) as pool:
        scans = list(pool.map(lambda path: scan_shard(path, needs=needs), shards))
    index = ShardIndex(shards, [rows for rows, _ in scans], [p for _, ps in scans for p in ps])
    if len(index) == 0:
        first = f" First: {index.problems[0]}" if index.problems else ""
        wanted = " and ".join(("an image", *needs))
        raise ValueError(
            f"{pattern}: {len(shards)} shard(s), and no usable sample ({wanted} with one key)."
            f"{first}"
        )
    return index


def scan_shard(
    path: Path, *, needs: tuple[str, ...] = (CAPTION_EXTENSION,)
) -> tuple[list[tuple[str, list[int]]], list[Problem]]:
    """A shard's usable samples, (key, six numbers of `Sample`'s places), and what is unusable."""
    problems: list[Problem] = []
    samples: dict[str, dict[str, tuple[int, int]]] = {}

    def report(key: str, kind: str, reason: str) -> None:
        problems.append(Problem(path.name, key, kind, reason))

    for name, place in _members(path, report):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem:
            continue  # hidden files, such as the ones that macOS adds
        key = f"{folder}/{stem}" if folder else stem
        members = samples.setdefault(key, {})
        role = _role(extension.lower())
        if role in members:
            report(key, "duplicate member", f"{name} occurs again; the first is used")
            continue
        members[role] = place
    rows = []
    # A truncated shard's last sample is part of that problem, not another one.
    truncated = any(problem.kind == "truncated shard" for problem in problems)
    cut = next(reversed(samples), None) if truncated else None
    for key, members in samples.items():
        if key == cut and not {"image", *needs} <= set(members):
            continue
        others = sorted(role for role in members if role not in ("image", "txt", "json"))
        if "image" not in members:
            has = ", ".join(f".{role}" for role in members)
            kind = "unsupported image" if others else "missing image"
            report(key, kind, f"none of {', '.join(IMAGE_EXTENSIONS)}; it has {has}")
            continue
        missing = [need for need in needs if need not in members]
        if missing:
            what = "caption" if missing[0] == CAPTION_EXTENSION else "metadata"
            report(key, f"missing {what}", f"no {key}.{missing[0]}")
            continue
        image, caption = members["image"], members.get("txt", _ABSENT)
        rows.append((key, [*image, *caption, *members.get("json", _ABSENT)]))
    return rows, problems


def _role(extension: str) -> str:
    return "image" if extension in IMAGE_EXTENSIONS else extension


def _members(
    path: Path, report: Callable[[str, str, str], None]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (offset, size) of every regular file in the tar."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        length = os.fstat(descriptor).st_size
        offset, long_name, pax = 0, "", {}
        if length == 0:
            report("", "empty shard", "the file has 0 bytes")
            return
        while True:
            block = os.pread(descriptor, _BLOCK, offset)
            if len(block) < _BLOCK:
                report("", "truncated shard", f"ends at byte {length} without an end mark")
                return
            if not any(block) and _is_end(descriptor, offset + _BLOCK, length):
                return
            size = _size(block, pax) if any(block) and _is_header(block) else None
            if size is None:
                following = _next_header(descriptor, offset + _BLOCK, length)
                lost = (following if following is not None else length) - offset
                kind = "damaged header" if offset or following is not None else "not a tar"
                report("", kind, f"{lost} bytes from byte {offset} on are lost")
                if following is None:
                    return
                offset, long_name, pax = following, "", {}
                continue
            start = offset + _BLOCK
            kind = block[156:157]
            name = long_name or pax.get("path") or _name(block)
            if start + size > length:
                report(_key(name), "truncated shard", f"{name} ends after the file's last byte")
                return
            offset = start + -(-size // _BLOCK) * _BLOCK
            if kind == b"L":
                content = os.pread(descriptor, size, start)
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                pax = _pax_records(os.pread(descriptor, size, start))
            else:
                if kind in (b"0", b"\0", b"7"):
                    yield name, (start, size)
                if kind not in (b"g", b"K"):
                    long_name, pax = "", {}
    finally:
        os.close(descriptor)


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _is_header(block: bytes) -> bool:
    try:
        stored = int(block[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    return stored == sum(block[:148]) + 8 * 32 + sum(block[156:])


def _is_end(descriptor: int, offset: int, length: int) -> bool:
    """Whether a tar ends after a first block of zeros: a second follows, or nothing but zeros.

    One zeroed block with more behind it is a damaged header. tarfile would stop here.
    """
    block = os.pread(descriptor, _BLOCK, offset)
    if len(block) < _BLOCK:
        return True
    return not any(block) and _next_header(descriptor, offset + _BLOCK, length) is None


def _next_header(descriptor: int, offset: int, length: int) -> int | None:
    """The next block that carries tar's magic and a right checksum."""
    while offset + _BLOCK <= length:
        chunk = os.pread(descriptor, 1024 * _BLOCK, offset)
        for start in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
            block = chunk[start : start + _BLOCK]
            if block[257:262] == b"ustar" and _is_header(block):
                return offset + start
        offset += len(chunk) - len(chunk) % _BLOCK or _BLOCK
    return None


def _size(block: bytes, pax: dict[str, str]) -> int | None:
    """Bytes of a header's member; None when the field holds no number, or a negative one."""
    field = block[124:136]
    if field[0] & 0x80:  # GNU's base 256 for sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        size = int(pax["size"]) if "size" in pax else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    return size if size >= 0 else None  # a negative one would send the walk back, for ever


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape").removeprefix("./")


def _pax_records(content: bytes) -> dict[str, str]:
    records = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or int(length) <= len(length):
            break
        record = content[len(length) + 1 : int(length) - 1]
        name, _, value = record.partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return records
