"""Walking a tar's headers: which members it has, and what is lost where it is damaged.

Only headers are read. A damaged header costs its own member: the walk goes on at the next block
that is a valid header, where tarfile (and webdataset) would drop the rest of the shard unsaid.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

BLOCK = 512
_LONGEST_NUMBER = 20  # digits
SIZE_FIELD = slice(124, 136)
"""Of a header."""


class Report(Protocol):
    """Takes what is wrong with a tar: a member's key ("" for none), kind and reason, bytes lost."""

    def __call__(self, key: str, kind: str, reason: str, lost_bytes: int = 0) -> None: ...


def members(path: Path, report: Report) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (offset, size) in bytes of every regular file in the tar."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        length = os.fstat(descriptor).st_size
        offset, long_name, pax = 0, "", {}
        if length == 0:
            report("", "empty shard", "the file has 0 bytes")
            return
        while True:
            block = os.pread(descriptor, BLOCK, offset)
            if len(block) < BLOCK:
                report("", "truncated shard", f"ends at byte {length} without an end mark")
                return
            if not any(block) and _is_end(descriptor, offset + BLOCK, length):
                return
            size = _size(block, pax) if any(block) and _is_header(block) else None
            if size is None:
                following = _next_header(descriptor, offset + BLOCK, length)
                lost = (following if following is not None else length) - offset
                kind = "damaged header" if offset or following is not None else "not a tar"
                report("", kind, f"{lost} bytes from byte {offset} on are lost", lost)
                if following is None:
                    return
                offset, long_name, pax = following, "", {}
                continue
            start = offset + BLOCK
            kind = block[156:157]
            name = (long_name or pax.get("path") or _name(block)).removeprefix("./")
            if start + size > length:
                following = _next_header(descriptor, start, length)
                if following is not None:  # a size that cannot be true hides what follows
                    reason = f"{name} is said to have {size} bytes"
                    report(key_of(name), "damaged header", reason, following - offset)
                    offset, long_name, pax = following, "", {}
                    continue
                reason = f"{name} ends after the file's last byte"
                report(key_of(name), "truncated shard", reason, length - offset)
                return
            offset = start + -(-size // BLOCK) * BLOCK
            if kind == b"L":
                content = os.pread(descriptor, size, start)
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                pax = _pax_records(os.pread(descriptor, size, start))
            else:
                if kind not in (b"0", b"\0", b"7"):
                    pass
                elif size_in(block[SIZE_FIELD]) == size:
                    yield name, (start, size)
                else:  # whoever reads it later goes by the header
                    reason = f"the size of {name} stands in a PAX record alone"
                    report(key_of(name), "unsupported member", reason)
                if kind not in (b"g", b"K"):
                    long_name, pax = "", {}
    finally:
        os.close(descriptor)


def key_of(name: str) -> str:
    """What the members of one sample share: folder and name up to the first point."""
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
    block = os.pread(descriptor, BLOCK, offset)
    if len(block) < BLOCK:
        return True
    return not any(block) and _next_header(descriptor, offset + BLOCK, length) is None


def _next_header(descriptor: int, offset: int, length: int) -> int | None:
    """The next block that carries tar's magic and a right checksum."""
    while offset + BLOCK <= length:
        chunk = os.pread(descriptor, 1024 * BLOCK, offset)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            block = chunk[start : start + BLOCK]
            if block[257:262] == b"ustar" and _is_header(block):
                return offset + start
        offset += len(chunk) - len(chunk) % BLOCK or BLOCK
    return None


def _size(block: bytes, pax: dict[str, str]) -> int | None:
    """Bytes of a header's member; None when the field holds no number, or a negative one."""
    if "size" not in pax or block[SIZE_FIELD][0] & 0x80:
        return size_in(block[SIZE_FIELD])
    try:
        size = int(pax["size"])
    except ValueError:
        return None
    return size if size >= 0 else None  # a negative one would send the walk back, for ever


def size_in(field: bytes) -> int | None:
    """The number in a header's field of the size; None where there is none."""
    if field[0] & 0x80:  # GNU's base 256 for sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    digits = field.lstrip(b" \0").replace(b"\0", b" ").split(b" ")[0]
    if digits.translate(None, b"01234567"):
        return None
    return int(digits or b"0", 8)


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _pax_records(content: bytes) -> dict[str, str]:
    records, begin = {}, 0
    while begin < len(content):
        blank = content.find(b" ", begin, begin + _LONGEST_NUMBER)
        digits = content[begin:blank]
        if blank < 0 or not digits.isdigit() or int(digits) <= len(digits):
            break
        end = begin + int(digits)
        name, _, value = content[blank + 1 : end - 1].partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        begin = end
    return records
