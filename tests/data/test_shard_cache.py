"""Copies of remote shards: whole, bounded, shared by processes, fetched ahead."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fastclip.data import loader as loader_module
from fastclip.data import plan as plan_module
from fastclip.data import remote, shard_cache, storage
from fastclip.data.eval_loader import EvalBatch, eval_batches
from fastclip.data.index import index_shards
from fastclip.data.reader import Members
from fastclip.data.remote import configure
from fastclip.data.remote_files import RemoteFile
from fastclip.data.shards import expand_shards
from remote_shards import (
    Server,
    copies,
    files,
    make_loader,
    remember,
    serve,
    stream,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("quick")


def test_training_goes_on_while_copies_make_room(
    server: Server, indexed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    address = serve(server, indexed)
    sizes = sum(len(content) for content in server.files.values())
    limit = 0.5 * sizes
    monkeypatch.setattr(storage, "_OPEN_FILES", 2)
    options = {"cache_gigabytes": limit / 1e9, "workers": 1}
    assert stream(address, cache, 16, **options) == stream(str(indexed), cache, 16)
    assert sum(path.stat().st_size for path in cache.glob("*/*.*")) <= limit
    assert sum(server.asked[f"/0000{n}.tar"] for n in range(6)) > 6
    assert "they are not all fetched ahead" in caplog.text


def test_who_has_a_copy_open_goes_on_reading_it(
    indexed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(indexed)
    first, second = (
        index_shards("memory://bucket/{00000..00001}.tar"),
        expand_shards("memory://bucket"),
    )
    before = Members(first[0]).image
    assert isinstance(second[0], RemoteFile)
    configure(str(cache), (second[0].size + 10_000) / 1e9, 0, 5)
    for shard in second[2:]:
        assert isinstance(shard, RemoteFile)
        shard_cache.fetch(shard)
    assert copies(cache) == ["00005.tar"]
    assert copies(cache, "*/*.fcidx") == ["00000.fcidx", "00001.fcidx"]  # which go last
    assert Members(first[0]).image == before
    assert copies(cache) == ["00005.tar"]
    # When it is not read any more it is closed, for its bytes are on the disk until then.
    shard_of = storage.FILES._open[second[0]]
    monkeypatch.setattr(storage, "_UNUSED", -1.0)
    assert shard_of.is_over()
    assert Members(first[8]).image
    assert second[0] not in storage.FILES._open
    assert Members(first[0]).image == before  # it is fetched again


def test_copies_make_room_where_the_disk_is_small(
    indexed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = files(remember(indexed))
    for time, shard in enumerate(shards[:2]):
        os.utime(shard_cache.fetch(shard), (time, time))
    shard_cache.fetch(shards[0])  # which makes it the one used last
    free = SimpleNamespace(free=shards[2].size - 1)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda path: free)
    shard_cache.fetch(shards[2])
    assert copies(cache) == ["00000.tar", "00002.tar"]


def test_a_full_disk_and_a_cache_too_small_say_what_to_do(
    indexed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = remember(indexed)
    with pytest.raises(ValueError, match=r"data\.cache_gigabytes=1e-06 holds no copy of it"):
        make_loader(address, cache, cache_gigabytes=1e-6)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    configure(str(cache), 1, 3, 5)
    (shard,) = files("memory://bucket/00000.tar")
    monkeypatch.setattr(shard_cache, "once", full)
    with pytest.raises(ValueError, match=r"is full: set data\.cache_dir"):
        shard_cache.fetch(shard)


def test_a_stale_copy_is_fetched_anew(server: Server, local: Path, cache: Path) -> None:
    """Of the same size, too."""
    address = serve(server, local)
    expected = stream(address, cache)
    content = server.files["/00001.tar"]
    server.files["/00001.tar"] = content.replace(b"a red ", b"a RED ")
    assert server.files["/00001.tar"] != content
    with make_loader(address, cache) as loader:
        captions = [text for _ in range(8) for text in next(loader).captions]
    assert any("RED" in text for text in captions)
    assert server.asked["/00001.tar"] == 2
    assert server.asked["/00000.tar"] == 1
    server.files["/00001.tar"] = content
    assert stream(address, cache) == expected
    assert server.asked["/00001.tar"] == 2  # both copies are there


def test_a_presigned_address_finds_its_copy_under_another_signature(
    server: Server, indexed: Path, cache: Path
) -> None:
    serve(server, indexed)
    for signature in ("one", "two"):
        (shard,) = files(f"{server.url}/00000.tar?sig={signature}")
        shard_cache.fetch(shard)
    assert server.asked["/00000.tar"] == 1


def test_a_shard_without_index_is_looked_through_once_for_all(
    server: Server, local: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = serve(server, local)
    first = index_shards(address)
    for copy in cache.glob("*/*.tar"):
        copy.unlink()
    monkeypatch.setattr(shard_cache, "scan_shard", None)
    again = index_shards(address)
    assert again.hash == first.hash
    assert [again[n].key for n in range(48)] == [first[n].key for n in range(48)]
    assert set(server.asked.values()) == {1}
    for own in cache.glob("*/*.fcidx"):  # as when they had to make room as well
        own.unlink()
    monkeypatch.undo()
    configure(str(cache), 1, 3, 5)
    third = index_shards(address)
    for path in cache.glob("*/0*"):
        path.unlink()
    third._shards[3].scanned = None
    assert third[24].key == "000024"
    assert server.asked["/00003.tar"] == 3
    fourth = index_shards(address)  # by the indices made here
    for own in cache.glob("*/*.fcidx"):
        own.unlink()
    assert fourth[32].key == "000032"


def test_an_index_that_made_room_is_fetched_again(
    indexed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_shards(remember(indexed))
    for copy in cache.glob("*/*.fcidx"):
        copy.unlink()
    assert index[47].key == "000047"
    assert copies(cache) == []


def test_what_is_no_index_is_named_and_not_used(
    indexed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some servers answer every request with a page."""
    address = remember(indexed)
    MemoryFileSystem().pipe_file("/bucket/00002.fcidx", b"<html>" * 100)
    assert len(index_shards(address)) == 48
    assert "the index beside memory://bucket/00002.tar is none, and not used" in caplog.text


def test_making_room_leaves_what_is_not_its_own(indexed: Path, cache: Path) -> None:
    mine = cache / "photos" / "thesis.jpg"
    elsewhere = cache.parent / "elsewhere" / "precious.bin"
    for path in (mine, elsewhere):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100_000))
        os.utime(path, (0, 0))
    (cache / ("0" * 32)).symlink_to(elsewhere.parent)
    size = (indexed / "00000.tar").stat().st_size
    configure(str(cache), 1.5 * size / 1e9, 0, 5)
    index = index_shards(remember(indexed))
    for number in range(len(index)):
        Members(index[number])
    assert 1 <= len(list(cache.glob("*/*.tar"))) <= 2
    assert mine.is_file()
    assert elsewhere.is_file()


def test_a_stale_index_on_the_other_side_is_named_and_not_used(
    indexed: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = remember(indexed)
    bucket = MemoryFileSystem()
    bucket.pipe_file("/bucket/00002.tar", bucket.cat_file("/bucket/00002.tar") + bytes(1024))
    index = index_shards(address)
    index.log_problems()
    assert "1 index file(s) are of other shards" in caplog.text
    assert len(index) == 48
    assert copies(cache) == ["00002.tar"]


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_read_next_is_fetched_ahead(
    indexed: Path, cache: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module.Plan.__init__, "__defaults__", (8 * count,))
    monkeypatch.setattr(loader_module, "WINDOW", 8 * count)
    with make_loader(remember(indexed), cache, prefetch_batches=1, workers=1) as loader:
        next(loader)
        ahead = loader._plan.shards(0, 8 * count + 1)
        assert len(ahead) == min(2 * count, 6)
        names = sorted(loader.index.shards[n].name for n in ahead)
        wait_until(lambda: copies(cache) == names)


CHILD = """
import sys
from fastclip.data.index import index_shards
from fastclip.data.reader import Members
from fastclip.data.remote import configure
configure(sys.argv[2], 1, 3, 30)
index = index_shards(sys.argv[1])
print(sum(len(Members(index[n]).image) for n in range(len(index))), flush=True)
"""


def _child(address: str, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, address, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_fetch_each_shard_once(server: Server, local: Path, cache: Path) -> None:
    address = serve(server, local)
    children = [_child(address, cache) for _ in range(2)]
    results = {child.communicate(timeout=60)[0] for child in children}
    assert [child.returncode for child in children] == [0, 0]
    index = index_shards(str(local))
    assert results == {f"{sum(len(Members(index[n]).image) for n in range(48))}\n"}
    assert server.asked == {f"/0000{n}.tar": 1 for n in range(6)}


def test_a_process_killed_while_it_fetches_leaves_a_usable_cache(
    server: Server, local: Path, cache: Path
) -> None:
    address = serve(server, local)
    server.faults["/00000.tar"] = ["hang"]
    child = _child(f"{server.url}/00000.tar", cache)
    assert server.stalled.wait(60)
    wait_until(lambda: any(path.stat().st_size for path in cache.glob("*/*.coming")))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert copies(cache) == []
    assert len(copies(cache, "*/*.coming")) == 1
    # Another shard's fetch takes away what nobody fetches any more.
    shard_cache.fetch(files(f"{server.url}/00001.tar")[0])
    assert copies(cache, "*/*.coming") == []
    assert stream(address, cache) == stream(str(local), cache)


@pytest.mark.timeout(60)
def test_a_loader_that_is_closed_does_not_wait_for_what_hangs(
    server: Server, indexed: Path, cache: Path
) -> None:
    address = serve(server, indexed)
    for number in range(6):
        server.faults[f"/0000{number}.tar"] = ["hang"]
    loader = make_loader(address, cache, remote_timeout_seconds=1000.0)
    waiting = ThreadPoolExecutor(1).submit(next, loader)
    assert server.stalled.wait(60)
    loader.close()
    assert waiting.exception() is not None
    assert not [t for t in threading.enumerate() if t.name.startswith("fastclip-prefetch")]
    assert copies(cache, "*/*.coming") == []


@pytest.mark.timeout(60)
def test_an_evaluation_that_is_left_does_not_wait_for_what_hangs(
    server: Server, indexed: Path, cache: Path
) -> None:
    index = index_shards(serve(server, indexed))
    configure(str(cache), 1, 0, 1000)
    server.faults["/00001.tar"] = ["hang"]
    batches = eval_batches(index, image_size=24, batch_size=8, workers=1)
    assert next(batches).keys == tuple(f"{n:06d}" for n in range(8))
    assert server.stalled.wait(60)
    cast(Generator[EvalBatch, None, None], batches).close()


def test_a_forked_child_holds_no_lock(tmp_path: Path) -> None:
    with shard_cache._locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with shard_cache._locked(tmp_path / "lock", wait=False) as lock:
            assert lock is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_where_copies_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remote.default_cache_dir() == tmp_path / "fastclip" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remote.default_cache_dir() == tmp_path / ".cache" / "fastclip" / "shards"
