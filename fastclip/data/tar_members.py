"""A sample's members out of an open tar, each behind the header that still has to say its size."""

from __future__ import annotations

import os

from fastclip.data.tar import BLOCK, SIZE_FIELD, size_in

try:
    from fastclip.data._native import read_members as _native_read
except ImportError:
    _native_read = None

Place = tuple[int, int]
"""Offset and size in bytes; an offset of -1 for a member that is not there."""

_FAULTS = {1: "is shorter than it was", 2: "is not what it was"}
"""When it was indexed."""


class ChangedError(Exception):
    """The tar has not got there what it had."""


def read_members(descriptor: int, places: tuple[Place, Place, Place]) -> tuple[bytes, bytes, bytes]:
    """The members at `places`, b"" for one that is not there.

    Raises:
        ChangedError: the file is shorter, or a header does not say the size that it should.
        OSError: it cannot be read.
    """
    found = (_native_read or read_members_portably)(descriptor, places)
    if isinstance(found, int):
        raise ChangedError(_FAULTS[found])
    return found


def read_members_portably(
    descriptor: int, places: tuple[Place, Place, Place]
) -> tuple[bytes, bytes, bytes] | int:
    """What the native function does: the members, or the number of a fault."""
    contents = []
    for offset, size in places:
        if offset < 0:
            contents.append(b"")
            continue
        block = _read(descriptor, offset - BLOCK, size + BLOCK) if size >= 0 else None
        if block is None:
            return 1
        if size_in(block[SIZE_FIELD]) != size:
            return 2
        contents.append(block[BLOCK:])
    return contents[0], contents[1], contents[2]


def _read(descriptor: int, begin: int, length: int) -> bytes | None:
    """So many bytes from `begin` on; None where the file ends before."""
    if begin < 0 or begin + length > os.fstat(descriptor).st_size:
        return None
    parts = []
    while length:  # a call reads 2 GiB at most
        part = os.pread(descriptor, length, begin)
        if not part:
            return None
        parts.append(part)
        begin, length = begin + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
