"""Shards on other machines: found, tried again, the batches of local ones, and no secret shown."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from fastclip.data import remote, shard_cache, storage
from fastclip.data.balance import balance
from fastclip.data.config import DataConfig
from fastclip.data.decode import BadSampleError
from fastclip.data.index import index_shards
from fastclip.data.indexing import build_index
from fastclip.data.reader import Members
from fastclip.data.remote import RemoteError, configure, persistently, shown
from fastclip.data.shards import expand_shards
from remote_shards import Server, copies, files, make_loader, remember, serve, stream

pytestmark = pytest.mark.usefixtures("quick")

SECRET = "sig=s3cr3t%2Fkey"


@pytest.mark.parametrize("kind", ["memory", "http"])
@pytest.mark.parametrize("with_index", [True, False])
def test_the_batches_are_those_of_local_shards(
    kind: str, with_index: bool, local: Path, indexed: Path, cache: Path,
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = indexed if with_index else local
    if kind == "http":
        address = serve(request.getfixturevalue("server"), folder)
    else:
        address = remember(folder)
    assert index_shards(address).hash == index_shards(str(local)).hash
    assert bool(copies(cache)) is not with_index  # with an index nothing else is fetched
    assert stream(address, cache) == stream(str(local), cache)
    assert len(copies(cache)) == 6
    assert ("6 of 6 remote shard(s) have no index beside them" in caplog.text) is not with_index


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("memory://bucket", ["bucket/00000.tar", "bucket/00001.tar"]),
        ("memory://bucket/", ["bucket/00000.tar", "bucket/00001.tar"]),
        ("memory://bucket/00001.tar", ["bucket/00001.tar"]),
        ("memory://*/00001.tar", ["bucket/00001.tar", "other/00001.tar"]),
        ("memory://bucket/0000?.tar", ["bucket/00000.tar", "bucket/00001.tar"]),
        ("memory://other/[0-9]*.tar", ["other/00001.tar"]),
        ("memory://bucket/{00000..00001}.tar", ["bucket/00000.tar", "bucket/00001.tar"]),
        ("memory://bucket::memory://bucket/*1.tar", ["bucket/00000.tar", "bucket/00001.tar"]),
    ],
)
def test_patterns(pattern: str, names: list[str]) -> None:
    for name in ("bucket/00000.tar", "bucket/00001.tar", "bucket/notes.txt", "other/00001.tar"):
        MemoryFileSystem().pipe_file(f"/{name}", b"x" * 7)
    found = expand_shards(pattern)
    assert [str(shard) for shard in found] == [f"memory://{name}" for name in names]
    assert [shard.name for shard in found] == [name.rpartition("/")[2] for name in names]


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("memory://bucket/1.tar", FileNotFoundError, r"no file memory://bucket/1\.tar"),
        ("memory://bucket/{0..1}.tar", FileNotFoundError, r"no file memory://bucket/1\.tar"),
        ("memory://bucket/x*.tar", FileNotFoundError, r"no file matches memory://bucket/x\*\.tar"),
        ("memory://notes", FileNotFoundError, r"the folder memory://notes holds no \*\.tar"),
        ("http://host/*.tar", ValueError, "http lists no folders"),
        ("https://host/folder/", ValueError, r"number the shards in braces, \{00000"),
        (
            "absent://host/0.tar",
            ImportError,
            "absent:// needs another package: pip install abs3nt",
        ),
        ("nothing://host/0.tar", ValueError, "fsspec knows no nothing://"),
    ],
)
def test_patterns_that_mean_nothing(
    pattern: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(known_implementations, "absent", {"class": "abs3nt.core.Files", "err": "?"})
    MemoryFileSystem().pipe_file("/bucket/0.tar", b"x")
    MemoryFileSystem().pipe_file("/notes/a.txt", b"x")
    with pytest.raises(error, match=message):
        expand_shards(pattern)


def test_a_folder_of_many_is_listed_and_not_asked_for_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: Counter[str] = Counter()

    def count(address: str, method: str, *args: Any, **options: Any) -> Any:
        calls[method] += 1
        return once(address, method, *args, **options)

    once = remote.once
    monkeypatch.setattr("fastclip.data.remote_files.once", count)
    for number in range(20):
        MemoryFileSystem().pipe_file(f"/bucket/{number:02d}.tar", b"x")
    assert len(expand_shards("memory://bucket/{00..19}.tar")) == 20
    assert calls["ls"] == 1  # from which other file systems answer the rest
    assert len(expand_shards("memory://bucket/{00..03}.tar")) == 4
    assert calls["ls"] == 1


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (["503", "503"], "503"),
        (["cut", "cut"], "Payload"),
        (["short"], r"\d+ bytes came, and it had \d+"),
        (["hang"], "nothing came for 0.4 s"),
    ],
)
def test_what_fails_is_tried_again(
    server: Server, indexed: Path, cache: Path, faults: list[str], said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    address = serve(server, indexed)
    server.faults["/00002.tar"] = list(faults)
    timeout = 0.4 if faults == ["hang"] else 5.0
    options = {"remote_timeout_seconds": timeout, "prefetch_batches": 1}
    assert stream(address, cache, **options) == stream(str(indexed), cache)
    assert server.asked["/00002.tar"] == len(faults) + 1
    retries = [r.message for r in caplog.records if "attempt" in r.message]
    assert len(retries) == len(faults)
    assert all(re.search(said, line) for line in retries)
    assert re.search(rf"{server.url}/00002\.tar: .* \(attempt 1 of 4; the next in 0", retries[0])
    assert copies(cache, "*/*.coming") == []


def test_slow_is_not_stuck(
    server: Server, indexed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes slowly may take longer than the limit, and than aiohttp's for a whole file."""
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.3))
    HTTPFileSystem.clear_instance_cache()
    serve(server, indexed)
    configure(str(cache), 1, 0, 0.3)
    server.faults["/00000.tar"] = ["slow"]
    (file,) = files(f"{server.url}/00000.tar")
    assert shard_cache.fetch(file).read_bytes() == server.files["/00000.tar"]
    HTTPFileSystem.clear_instance_cache()


@pytest.mark.timeout(60)
def test_a_start_that_fails_does_not_wait_for_what_hangs(
    server: Server, local: Path, cache: Path
) -> None:
    address = serve(server, local)
    server.faults |= {"/00000.tar": ["always 403"], "/00001.tar": ["hang"]}
    configure(str(cache), 1, 0, 1000)
    with pytest.raises(RemoteError, match=r"00000\.tar: .*403"):
        index_shards(address)


def test_a_file_that_is_refused_is_not_asked_for_again(server: Server) -> None:
    begin = len(server.asked)
    with pytest.raises(FileNotFoundError, match="no file"):
        expand_shards(f"{server.url}/0.tar")
    assert len(server.asked) == begin
    server.files["/0.tar"] = b"x"
    (file,) = files(f"{server.url}/0.tar")
    del server.files["/0.tar"]
    with pytest.raises(RemoteError, match=r"/0\.tar: there is no such file") as caught:
        shard_cache.fetch(file)
    assert caught.value.missing


def test_a_server_that_fails_is_not_taken_for_one_without_the_index(server: Server) -> None:
    """Looking through a shard whose index is there would be slow, and nobody would know why."""
    server.files |= {"/0.tar": b"x", "/0.fcidx": b"x"}
    for fault in ("always 503", "never 503"):
        server.asked.clear()
        server.faults["/0.fcidx"] = [fault]
        with pytest.raises(RemoteError, match=r"/0\.fcidx: .*503"):
            index_shards(f"{server.url}/0.tar")
        assert server.asked["/0.fcidx"] == 4


def test_an_index_that_may_not_be_read_is_as_good_as_none(server: Server, local: Path) -> None:
    """So S3 answers about what is not there, if one may read but not list."""
    serve(server, local)
    server.files["/00000.fcidx"] = b"x"
    server.faults["/00000.fcidx"] = ["never 403"]
    assert len(index_shards(f"{server.url}/00000.tar")) == 8
    assert server.asked["/00000.fcidx"] == 1  # no retries


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 1.0)
    monkeypatch.setattr(remote, "pause", pauses.append)
    configure("", 1, 8, 60)

    def fail() -> None:
        raise ConnectionResetError("it went away")

    with pytest.raises(RemoteError, match="memory://a: ConnectionResetError: it went away"):
        persistently("memory://a", fail)
    assert len(pauses) == 8
    for number, seconds in enumerate(pauses):
        assert 0.5 <= seconds / min(2**number, 30) <= 1


def test_a_shard_that_cannot_be_had_costs_its_samples_and_not_a_try_for_each(
    server: Server, indexed: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = serve(server, indexed)
    server.faults["/00003.tar"] = ["always 503"]
    path = tmp_path / "quarantine.jsonl"
    stream(address, cache, 24, quarantine=path)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {entry["shard"] for entry in entries} == {f"{server.url}/00003.tar"}
    assert {entry["kind"] for entry in entries} == {"unreadable"}
    assert len({entry["key"] for entry in entries}) == 8
    assert server.asked["/00003.tar"] == 4  # three retries
    # A minute later it is asked for again, and with other samples of it all is well.
    (shard,) = files(f"{server.url}/00003.tar")
    server.faults.clear()
    with pytest.raises(RemoteError, match="503"):
        shard_cache.fetch(shard)
    assert server.asked["/00003.tar"] == 4
    monkeypatch.setattr(shard_cache, "_FAILURE_LASTS", 0.0)
    shard_cache.fetch(shard)
    assert server.asked["/00003.tar"] == 5
    # What is started anew does not wait for that.
    os.truncate(shard_cache.copy_path(shard), 0)
    server.faults["/00003.tar"] = ["503"] * 4
    monkeypatch.undo()
    configure(str(cache), 1, 3, 5)
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    with pytest.raises(BadSampleError, match="503"):
        storage.FILES.read(shard, ((512, 1), (-1, 0), (-1, 0)))
    storage.FILES.forget([shard])
    time.sleep(0.01)  # longer than a file system's clock stands still
    assert len(Members(index_shards(str(shard))[0]).image) > 0


def test_a_shard_that_vanishes_ends_in_the_quarantine(
    indexed: Path, cache: Path, tmp_path: Path
) -> None:
    address = remember(indexed)
    path = tmp_path / "quarantine.jsonl"
    with make_loader(address, cache, quarantine=path) as loader:
        MemoryFileSystem().rm_file("/bucket/00004.tar")
        keys = [key for _ in range(16) for key in next(loader).keys]
        assert loader.report() == {"unreadable": 8}
    lost = {f"{number:06d}" for number in range(32, 40)}
    assert {json.loads(line)["key"] for line in path.read_text().splitlines()} == lost
    assert len(keys) == 96
    assert not lost & set(keys)
    remember(indexed)
    with make_loader(address, cache, max_bad_fraction=0.1) as loader:
        MemoryFileSystem().rm_file("/bucket/00004.tar")
        shutil.rmtree(cache)
        with pytest.raises(ValueError, match=r"more than data\.max_bad_fraction=0\.1"):
            list(itertools.islice(loader, 60))


def test_secrets_are_not_shown(
    server: Server, indexed: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="fastclip")
    serve(server, indexed)
    addresses = [f"{server.url}/0000{number}.tar?{SECRET}" for number in range(6)]
    server.faults["/00001.tar"] = ["503", "always 503"]
    path = tmp_path / "quarantine.jsonl"
    with make_loader("::".join(addresses), cache, quarantine=path) as loader:
        for _ in range(16):
            next(loader)
        shard = loader.index.shards[1]
    assert str(shard) == repr(shard) == f"{server.url}/00001.tar"
    assert shard.name == "00001.tar"
    with pytest.raises(ValueError, match="more than the 8 usable ones") as few:
        make_loader(addresses[0], cache, batch_size=9)
    texts = [caplog.text, path.read_text(), str(few.value), *_messages(server, addresses[0])]
    for text in texts:
        assert "00001.tar" in text or "0000" in text
        assert "s3cr3t" not in text


def _messages(server: Server, address: str) -> list[str]:
    found = []
    for pattern in (
        f"{address}::",
        f"{server.url}/00009.tar?{SECRET}",
        f"{server.url}/0000*.tar?{SECRET}",
        f"absent://user:s3cr3t@host/00001.tar?{SECRET}",
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            expand_shards(pattern)
        found.append(str(caught.value))
    server.files["/00007.tar"] = b"x"
    server.faults["/00007.tar"] = ["always 503"]
    (file,) = files(f"{server.url}/00007.tar?{SECRET}&x=y")
    with pytest.raises(RemoteError) as failed:
        shard_cache.fetch(file)
    return [*found, str(failed.value), repr(failed.value)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("503, url='http://h:1/a.tar?X-Sig=a/b%2F&k=1'", "503, url='http://h:1/a.tar'"),
        ("https://h/a?token::s3://b/c.tar", "https://h/a::s3://b/c.tar"),
        ("sftp://me:pass@host/a.tar", "sftp://host/a.tar"),
        ("https://token@host/a.tar", "https://host/a.tar"),
        ("abfs://container@account/a.tar", "abfs://container@account/a.tar"),
        ("s3://b/0?.tar, is it there?", "s3://b/0?.tar, is it there?"),
        ("s3://b/0.tar?versionId=1 is", "s3://b/0.tar is"),
        ("/data/0?.tar", "/data/0?.tar"),
    ],
)
def test_what_is_shown_of_addresses(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_what_works_beside_the_shards_refuses_remote_ones(indexed: Path, tmp_path: Path) -> None:
    address = remember(indexed)
    for work in (lambda: build_index(address), lambda: balance(address, ["red"], tmp_path / "out")):
        with pytest.raises(ValueError, match=r"00000\.tar: this works on local files alone"):
            work()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_gigabytes": 0.0}, r"data\.cache_gigabytes is more than 0, not 0"),
        ({"remote_timeout_seconds": float("inf")}, r"data\.remote_timeout_seconds is more than 0"),
        ({"remote_retries": -1}, r"data\.remote_retries is at least 0, not -1"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(train="a", **options)
