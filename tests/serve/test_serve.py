"""`serve` as a process: it serves and stops, and says in a line why it cannot."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fastclip.serve.app import listen, serve
from indexed import write_index, write_model

PROGRAM = """
import logging, sys
from pathlib import Path
from fastclip.serve.app import serve
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
serve(Path(sys.argv[1]), host=sys.argv[2], port=0)
"""


@pytest.fixture(scope="module")
def index_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("indexed"), pairs=16)


def test_serves_until_it_is_interrupted(index_path: Path) -> None:
    command = [sys.executable, "-u", "-c", PROGRAM, str(index_path), "0.0.0.0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "http://" in line:
                break
        assert any("no login" in line for line in said)
        assert "16 images" in said[-1]
        port = said[-1].split("http://")[1].split()[0].rpartition(":")[2]
        answer = httpx.get(f"http://127.0.0.1:{port}/api/search?q=a+circle&k=3", timeout=60)
        assert len(answer.json()["results"]) == 3
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_a_port_in_use() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} of 127.0.0.1 is in use: .*--port"):
            listen("127.0.0.1", port)


def test_addresses_that_are_none() -> None:
    with pytest.raises(OSError, match=r"192\.0\.2\.1:0 cannot be listened on"):
        listen("192.0.2.1", 0)
    with pytest.raises(OSError, match="ports are from 0 to 65535, not 99999"):
        listen("127.0.0.1", 99999)
    with pytest.raises(OSError, match="no address of this machine"):
        listen("no name", 0)
    with listen("localhost", 0) as found:
        assert found.family in (socket.AF_INET, socket.AF_INET6)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no index"):
        serve(tmp_path)


def test_another_model(index_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was made with the model"):
        serve(index_path, model=write_model(tmp_path / "other", seed=9))
