"""A web server that fails as it is told to, and loaders of what it serves."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from fastclip.data.config import DataConfig
from fastclip.data.loader import TrainLoader
from fastclip.data.remote_files import RemoteFile
from fastclip.data.shards import expand_shards
from fastclip.tokenizer import Tokenizer

TOKENIZER = Tokenizer(context_length=32)


class Server(ThreadingHTTPServer):
    """Serves files; each of a path's `faults` spoils one of its downloads, "always 503" every one,
    "never 503" also what is asked about it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        """Downloads of each path."""

        self.stalled, self.released = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are meant to."""


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        content = self.server.files.get(path)
        if content is None:
            self.send_error(404)
            return
        fault, faults = "", self.server.faults.get(path, [])
        self.server.asked[path] += body
        if faults and (body or faults[0].startswith("never")):
            fault = faults[0] if faults[0].startswith(("always", "never")) else faults.pop(0)
        if status := re.search(r"\d+", fault):
            self.send_error(int(status[0]))
            return
        sent = content[: len(content) // 2] if fault and fault != "slow" else content
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent if fault == "short" else content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        for begin in range(0, len(sent) if body else 0, len(sent) // 8 or 1):
            self.wfile.write(sent[begin : begin + (len(sent) // 8 or 1)])
            time.sleep(0.06 if fault == "slow" else 0)
        if fault == "hang":
            self.wfile.flush()
            self.server.stalled.set()
            self.server.released.wait(60)

    def log_message(self, *args: Any, **options: Any) -> None:
        """Into nothing."""


def serve(server: Server, folder: Path) -> str:
    """Serve a folder's files; gives the address of its six shards."""
    server.files |= {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return f"{server.url}/{{00000..00005}}.tar"


def remember(folder: Path) -> str:
    """Put a folder's files into memory; gives their address."""
    for path in folder.iterdir():
        MemoryFileSystem().pipe_file(f"/bucket/{path.name}", path.read_bytes())
    return "memory://bucket/"


def make_loader(train: str, cache: Path, **options: Any) -> TrainLoader:
    """Of one rank, with batches of six."""
    quarantine, batch_size = options.pop("quarantine", None), options.pop("batch_size", 6)
    settings = {"remote_retries": 3, "remote_timeout_seconds": 5.0, "max_bad_fraction": 1.0}
    return TrainLoader(
        DataConfig(train=train, cache_dir=str(cache), **(settings | options)),
        image_size=24,
        tokenizer=TOKENIZER,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        seed=0,
        quarantine=quarantine,
    )


def stream(train: str, cache: Path, steps: int = 12, **options: Any) -> list[tuple[str, bytes]]:
    """Key and pixels at each place."""
    with make_loader(train, cache, **options) as loader:
        batches = [next(loader) for _ in range(steps)]
    return [
        (key, image.contiguous().numpy().tobytes())
        for batch in batches
        for key, image in zip(batch.keys, batch.images, strict=True)
    ]


def copies(cache: Path, pattern: str = "*/*.tar") -> list[str]:
    """Names of the cache's files."""
    return sorted(path.name for path in cache.glob(pattern))


def files(*addresses: str) -> list[RemoteFile]:
    """What is meant by these addresses."""
    found = expand_shards("::".join(addresses))
    return [shard for shard in found if isinstance(shard, RemoteFile)]


def wait_until(until: Callable[[], bool]) -> None:
    """Until it is so."""
    end = time.monotonic() + 20
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)
