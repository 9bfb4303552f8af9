"""`server_config`: connections that ask nothing are closed, and those that ask are not."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import ClassVar

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from fastclip.serve.app import listen
from fastclip.serve.connections import PromptProtocol, server_config

CONNECTIONS = 5
GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


class Quick(PromptProtocol):
    head_seconds: ClassVar[float] = 1.0


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body; under /unread before it has come."""
    if scope["type"] == "http":
        body = b"early" if scope["path"] == "/unread" else await Request(scope, receive).body()
        await PlainTextResponse(body + b"!")(scope, receive, send)


@pytest.fixture
def port() -> Iterator[int]:
    listening = listen("127.0.0.1", 0)
    config = server_config(_echo, protocol=Quick, connections=CONNECTIONS)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


@contextlib.contextmanager
def _connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        yield client


def _closed(client: socket.socket) -> bool:
    """Whether the server closes the connection and says nothing; waits for it."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def _answer(client: socket.socket) -> bytes:
    """All up to the sign that ends each answer."""
    said = b""
    while not said.endswith(b"!"):
        part = client.recv(1 << 16)
        assert part, said
        said += part
    return said


def test_silent_connections_do_not_keep_others_out(port: int) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(_connected(port)) for _ in range(CONNECTIONS)]
        assert httpx.get(f"http://127.0.0.1:{port}", timeout=60).status_code == 503
        assert all(_closed(each) for each in silent)
        assert httpx.get(f"http://127.0.0.1:{port}", timeout=60).status_code == 200


def test_as_many_connections_as_are_allowed(port: int) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_connected(port)) for _ in range(CONNECTIONS)]
        clients[-1].sendall(GET)
        assert b"200 OK" in _answer(clients[-1])


def test_a_head_that_comes_in_drops_gets_no_more_time(port: int) -> None:
    with _connected(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: ")
        client.settimeout(Quick.head_seconds / 10)
        for _ in range(600):
            try:
                assert client.recv(1) == b""
                break
            except TimeoutError:
                with contextlib.suppress(ConnectionError):
                    client.sendall(b"x")
            except ConnectionResetError:
                break
        else:
            pytest.fail("the connection is held")


def test_a_later_head_that_does_not_come(port: int) -> None:
    with _connected(port) as client:
        client.sendall(GET)
        assert b"200 OK" in _answer(client)
        client.sendall(b"G")
        assert _closed(client)


def test_a_body_that_is_answered_before_it_comes(port: int) -> None:
    with _connected(port) as client:
        client.sendall(b"POST /unread HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n")
        assert b"early!" in _answer(client)
        client.sendall(b"x")
        assert _closed(client)


def test_a_request_in_time_is_not_cut_off(port: int) -> None:
    with _connected(port) as client, _connected(port) as clock:
        client.sendall(GET)
        assert b"200 OK" in _answer(client)
        client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n")
        client.sendall(b"Expect: 100-continue\r\n\r\n")
        assert b" 100 " in client.recv(1 << 16)
        assert _closed(clock)
        with _connected(port) as later:  # its time begins after the head has come
            assert _closed(later)
        client.sendall(b"ab")
        assert _answer(client).endswith(b"ab!")
        client.sendall(GET)
        assert b"200 OK" in _answer(client)


def test_what_serve_runs_with() -> None:
    config = server_config(_echo)
    assert (config.http, config.limit_concurrency) == (PromptProtocol, 65)
    assert PromptProtocol.head_seconds == 10
