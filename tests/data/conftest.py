"""Shards, and places that remote ones are fetched from and to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fastclip.data import remote, storage
from fastclip.data.indexing import build_index
from fastclip.data.remote import configure
from remote_shards import Server
from shards import write_shards


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("aiohttp", reason="fsspec's http needs aiohttp")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), pairs=48, per_shard=8)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = write_shards(tmp_path_factory.mktemp("indexed"), pairs=48, per_shard=8)
    build_index(str(shards), workers=0)
    return shards


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def quick(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of the test's own, and short pauses."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "_settings", None)
    storage.FILES._open.clear()
    configure(str(cache), 1, 3, 5)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
