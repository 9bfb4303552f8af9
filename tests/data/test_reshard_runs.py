"""Runs of resharding that fail, are killed, go on, or must not begin."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastclip.data import reshard as reshard_module
from fastclip.data.indexing import build_index
from fastclip.data.reshard import reshard
from fastclip.data.resharder import Resharder, shrink
from resharding import PAIRS, Pair, dropped, everything, write_input
from shards import write_tar


@pytest.mark.parametrize("passed", [0, 5, 21, 39])
def test_a_run_that_failed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: int
) -> None:
    shards = str(write_input(tmp_path / "in", PAIRS))
    options: dict[str, Any] = {"short": 30, "samples_per_shard": 6, "shuffle": 3}
    summary = reshard(shards, tmp_path / "straight", **options)
    calls = 0

    class StoppedError(Exception):
        pass

    def failing(*arguments: Any, **options: Any) -> bytes | None:
        nonlocal calls
        calls += 1
        if calls == passed + 1:
            raise StoppedError
        return shrink(*arguments, **options)

    monkeypatch.setattr("fastclip.data.resharder.shrink", failing)
    with pytest.raises(StoppedError):
        reshard(shards, tmp_path / "stopped", **options)
    done = passed // 6
    assert len(list((tmp_path / "stopped").glob("*.tar"))) == done
    assert not list((tmp_path / "stopped").rglob("*.partial"))
    assert reshard(shards, tmp_path / "stopped", **options) == summary
    assert calls == passed + 1 + 40 - 6 * done
    assert everything(tmp_path / "stopped") == everything(tmp_path / "straight")


_SCRIPT = """
import sys, time
from pathlib import Path
import fastclip.data.resharder as module
shrink = module.shrink
def until_three_are_written(*arguments, **options):
    while len(list(Path(sys.argv[2]).glob("*.tar"))) >= 3:
        time.sleep(0.01)
    return shrink(*arguments, **options)
module.shrink = until_three_are_written
if __name__ == "__main__":
    from fastclip.data.reshard import reshard
    reshard(sys.argv[1], Path(sys.argv[2]), short=30, samples_per_shard=5, workers=2)
"""


def test_a_killed_run_goes_on_and_its_workers_end(tmp_path: Path) -> None:
    shards, out = str(write_input(tmp_path / "in", PAIRS)), tmp_path / "out"
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    process = subprocess.Popen([sys.executable, script, shards, out], start_new_session=True)
    try:
        _wait(lambda: len(list(out.glob("*.tar"))) >= 3)
        assert process.poll() is None
        with pytest.raises(ValueError, match="another process is resharding"):
            reshard(shards, out, short=30, samples_per_shard=5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _wait(lambda: not _lives(process.pid))
    finally:
        if _lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    written = len(list(out.glob("*.tar")))
    assert 3 <= written < 8
    assert not (out / "reshard.json").exists()
    summary = reshard(shards, out, short=30, samples_per_shard=5)
    assert reshard(shards, tmp_path / "straight", short=30, samples_per_shard=5) == summary
    assert everything(out) == everything(tmp_path / "straight")
    assert not list(out.rglob("*.partial"))


def _wait(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _lives(group: int) -> bool:
    """Whether a process of the group runs; one that nobody has waited for does not."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state not in ("Z", "X"):
            return True
    return False


def test_workers_change_nothing(tmp_path: Path) -> None:
    pairs: list[Pair] = [*PAIRS, ("cut", {"jpg": PAIRS[1][1]["jpg"][:900], "txt": b"x"})]
    shards = str(write_input(tmp_path / "in", pairs))
    for workers in (1, 2):
        reshard(
            shards, tmp_path / f"{workers}", short=30, samples_per_shard=9, shuffle=1,
            workers=workers,
        )  # fmt: skip
    assert everything(tmp_path / "1") == everything(tmp_path / "2")
    assert dropped(tmp_path / "1") == [("cut", "broken image")]


def test_errors_of_workers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_input(tmp_path / "in", PAIRS[:14])
    build_index(str(shards), workers=0)
    make_plan, times = reshard_module.make_plan, itertools.count(1)

    def then_change(*arguments: Any) -> Any:
        plan = make_plan(*arguments)
        os.utime(shards / "in001.tar", (0, next(times)))
        return plan

    monkeypatch.setattr(reshard_module, "make_plan", then_change)
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"in001\.tar has changed after it was indexed"):
            reshard(str(shards), tmp_path / "out", short=30, samples_per_shard=5, workers=workers)
        assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]


def test_another_job_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    shards, out = write_input(tmp_path / "in", PAIRS[:14]), tmp_path / "out"
    options: dict[str, Any] = {"short": 30, "samples_per_shard": 6}
    reshard(str(shards), out, **options)
    before = everything(out)

    def refused(message: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=message):
            reshard(str(shards), out, **(options | changed))
        assert everything(out) == before

    refused("begun otherwise: short was 30, now 31", short=31)
    refused("quality was 90, now 80", quality=80)
    refused("dedup was none, now pairs", dedup="pairs")
    refused(r"needs was \['txt'\], now \[\]", needs=())
    refused("samples_per_shard was 6, now 7", samples_per_shard=7)
    refused("shuffle was None, now 0", shuffle=0)
    refused("apply_orientation was False, now True", apply_orientation=True)
    changed = [(key, {**members, "txt": members["txt"][::-1]}) for key, members in PAIRS[7:14]]
    write_tar(shards / "in001.tar", changed)  # of the same size
    refused(r"a shard was in001\.tar of 7 samples with hash .*, now in001\.tar of 7 samples")
    write_tar(shards / "in001.tar", PAIRS[7:14])
    write_tar(shards / "in002.tar", PAIRS[14:15])
    refused("shards were 2, now 3")
    (shards / "in002.tar").unlink()
    reshard(str(shards), out, **options, workers=2)


def test_what_is_complete_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, out = str(write_input(tmp_path / "in", PAIRS[:20])), tmp_path / "out"
    summary = reshard(shards, out, short=30, samples_per_shard=6)
    before = everything(out)
    (out / "00001.tar").unlink()
    (out / "00002.tar").write_bytes(b"")
    done = []
    write = Resharder.write
    monkeypatch.setattr(Resharder, "write", lambda self, n: (done.append(n), write(self, n)))
    assert reshard(shards, out, short=30, samples_per_shard=6) == summary
    assert reshard(shards, out, short=30, samples_per_shard=6) == summary
    assert everything(out) == before
    assert done == [1, 2]


def test_samples_that_are_missing_are_noticed(tmp_path: Path) -> None:
    shards, out = str(write_input(tmp_path / "in", PAIRS[:12])), tmp_path / "out"
    reshard(shards, out, short=30, samples_per_shard=6)
    record = out / ".reshard/00001.tar.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"written": 5}))
    with pytest.raises(RuntimeError, match="12 samples were given, 11 written and 0 left out"):
        reshard(shards, out, short=30, samples_per_shard=6)
    record.write_text(json.dumps(content))
    write_tar(out / "zzz.tar", PAIRS[:1])
    with pytest.raises(RuntimeError, match="has 13 samples; 12 were written"):
        reshard(shards, out, short=30, samples_per_shard=6)


def test_bad_arguments_and_folders_are_refused(tmp_path: Path) -> None:
    shards = write_input(tmp_path / "in", PAIRS[:3])

    def refused(message: str, out: Path = tmp_path / "out", **arguments: Any) -> None:
        with pytest.raises(ValueError, match=message):
            reshard(str(shards), out, **arguments)
        assert not (tmp_path / "out").exists()

    refused("short", short=-1)
    refused("short=0 copies images", short=0, apply_orientation=True)
    refused("quality", quality=0)
    refused("quality", quality=101)
    refused("dedup is none, images, pairs, not 'all'", dedup="all")
    refused("needs names txt and json, not cls", needs=("txt", "cls"))
    refused("samples_per_shard", samples_per_shard=0)
    refused("max_pixels", max_pixels=0)
    refused("shuffle", shuffle=-1)
    refused("shuffle", shuffle=1 << 64)
    refused("workers", workers=0)
    refused("would be read as a list of shards", tmp_path / "a::b")
    refused("would be read as a list of shards", tmp_path / "{0..1}")
    refused("holds the shards to rewrite", shards)
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other/mine.tar", PAIRS[:1])
    refused("shards of something else", tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        reshard(str(tmp_path / "absent"), tmp_path / "out")
