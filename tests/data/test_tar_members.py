"""Members out of a tar: the native reader and the portable one, side by side."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastclip.data import tar_members
from fastclip.data.index import index_shards
from fastclip.data.tar_members import ChangedError, read_members, read_members_portably
from shards import sample, write_tar

_native = pytest.importorskip("fastclip.data._native", reason="the native module is not built")
BOTH = [_native.read_members, read_members_portably]
LARGE = os.urandom(20 << 20)


@pytest.fixture
def tar(tmp_path: Path) -> Iterator[tuple[int, Path, list[dict[str, bytes]]]]:
    """Samples with neighbouring members, members apart, empty and large ones."""
    rows: list[tuple[str, dict[str, bytes]]] = [sample(n) for n in range(6)]
    rows += [("apart", {"png": b"x" * 700}), ("large", {"png": LARGE, "txt": b"", "json": b"{}"})]
    rows += [sample(n) for n in range(6, 40)]
    rows += [("apart", {"txt": b"late"}), ("bare", {"png": b"y"})]
    path = write_tar(tmp_path / "a.tar", rows)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor, path, [members for _, members in rows]
    os.close(descriptor)


def _places(path: Path) -> list[Any]:
    index = index_shards(str(path), needs=())
    samples = [index[number] for number in range(len(index))]
    return [(found.image, found.caption, found.metadata) for found in samples]


@pytest.mark.parametrize("read", BOTH)
def test_what_is_there(tar: tuple[int, Path, list[dict[str, bytes]]], read: Any) -> None:
    descriptor, path, rows = tar
    expected = [tuple(m.get(e, b"") for e in ("png", "txt", "json")) for m in rows if "png" in m]
    expected[6] = (b"x" * 700, b"late", b"")  # its caption lies far behind
    assert [read(descriptor, places) for places in _places(path)] == expected
    assert read(descriptor, ((-1, 0), (-1, 0), (-1, 0))) == (b"", b"", b"")


def test_faults_are_judged_alike(tar: tuple[int, Path, list[dict[str, bytes]]]) -> None:
    descriptor, path, _ = tar
    places = _places(path)
    rng = random.Random(0)
    kinds: set[object] = set()
    size = path.stat().st_size
    for _ in range(2000):
        wrong = [list(place) for place in rng.choice(places)]
        which = wrong[rng.randrange(3)]
        choices = (which[0] + 512, which[0] - 512, rng.randrange(size * 2), 100, which[0])
        which[0] = rng.choice(choices)
        which[1] = rng.choice((which[1], which[1] + 1, 1 << 40, -5, 0, rng.randrange(5000)))
        given = tuple(map(tuple, wrong))
        found = [read(descriptor, given) for read in BOTH]
        if isinstance(found[1], int):
            assert isinstance(found[0], int), given  # which fault is seen first may differ
            kinds.add(found[1])
        else:
            assert found[0] == found[1]
            kinds.add("read")
    assert kinds == {1, 2, "read"}


def test_faults_are_said(
    tar: tuple[int, Path, list[dict[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor, path, _ = tar
    image, caption, metadata = _places(path)[0]
    for native in (tar_members._native_read, None):
        monkeypatch.setattr(tar_members, "_native_read", native)
        assert read_members(descriptor, (image, caption, metadata))[1] == b"a red circle"
        with pytest.raises(ChangedError, match="is not what it was"):
            read_members(descriptor, ((image[0], image[1] + 1), caption, metadata))
        with pytest.raises(ChangedError, match="is shorter than it was"):
            read_members(descriptor, (image, (1 << 40, 5), metadata))
        with pytest.raises(OSError, match="Bad file descriptor"):
            read_members(-1, (image, caption, metadata))


@pytest.mark.parametrize(
    "places", [((1, 2),), ((-1, 0), (3,), (4, 5)), ((-1, 0), (-1, 0), ("a", 5)), 5]
)
def test_what_are_no_places(places: Any) -> None:
    with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)):
        _native.read_members(0, places)
