"""Files are whole or not there, and where they will be is checked before the work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from fastclip.data.rewriting import check_target, write_whole


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")

    def fail(file: IO[bytes]) -> None:
        file.write(b"begun")
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        write_whole(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_targets_are_checked_first(tmp_path: Path) -> None:
    check_target(tmp_path / "new" / "a.json")
    assert list((tmp_path / "new").iterdir()) == []
    check_target(tmp_path / "b.svg", ".png", ".svg")
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        check_target(tmp_path)
    with pytest.raises(ValueError, match=r"b\.jpg is written as \.png or \.svg"):
        check_target(tmp_path / "b.jpg", ".png", ".svg")
    with pytest.raises(OSError, match=r"/proc/x\.json cannot be written"):
        check_target(Path("/proc/x.json"))


def test_every_rank_may_check_a_target_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check_target(tmp_path / "a.json"), range(2000)))
    assert list(tmp_path.iterdir()) == []
