"""A live server of a small index, for tests that ask it by HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from fastclip.search.encoder import Encoder
from fastclip.search.index import SearchIndex
from fastclip.serve.app import build_app, listen
from fastclip.serve.connections import server_config


@contextmanager
def served(index_path: Path, **options: str) -> Iterator[str]:
    """Serve an index in a thread, on a free port; yields the address.

    Args:
        options: of `build_app`.
    """
    index = SearchIndex.open(index_path)
    encoder = Encoder(Path(index.info.model_path))
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(server_config(build_app(index, encoder, **options)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        # It listens already: requests wait until it is ready.
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
