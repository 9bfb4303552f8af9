"""Who may ask: names of the server, pages of other sites, and errors that nobody expected."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from fastclip.serve.guard import AllowedHosts, Guard, is_loopback
from indexed import write_index
from served import served
from shards import picture


@pytest.mark.parametrize(
    ("host", "header", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "localhost:8000", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "[::1]:8000", True),
        ("127.0.0.1", "192.0.2.7:8000", False),
        ("127.0.0.1", "evil.example", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "evil.example@localhost", False),
        ("127.0.0.1", "localhost/evil", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "[", False),
        ("::1", "[::1]:8000", True),
        ("0.0.0.0", "192.0.2.7:8000", True),
        ("0.0.0.0", "localhost", True),
        ("0.0.0.0", "evil.example:8000", False),
        ("::", "[2001:db8::1]:8000", True),
        ("search.example", "search.example:8000", True),
        ("search.example", "evil.example:8000", False),
    ],
)
def test_allowed_hosts(host: str, header: str, allowed: bool) -> None:
    assert (header in AllowedHosts(host)) == allowed


def test_further_hosts() -> None:
    assert "pictures.example" in AllowedHosts("127.0.0.1", ["Pictures.example"])
    assert [is_loopback(h) for h in ("localhost", "127.0.0.2", "::1", "0.0.0.0", "::", "a.b")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_names_and_origins_by_http(tmp_path: Path) -> None:
    with served(write_index(tmp_path, pairs=16)) as address, httpx.Client(base_url=address) as c:
        assert c.get("/", headers={"Host": "evil.example"}).status_code == 421
        port = httpx.URL(address).port

        def send(**headers: str) -> int:
            kind = {"Content-Type": "image/png"}
            content = picture("red", "circle", 1)
            return c.post("/api/images", content=content, headers={**kind, **headers}).status_code

        assert send() == 200
        assert send(Origin=address) == 200
        assert send(Origin="http://evil.example") == 403
        assert send(Origin="null") == 403
        assert send(Origin=f"http://localhost:{port}") == 403  # another origin than the address
        assert send(**{"Sec-Fetch-Site": "cross-site"}) == 403
        assert send(**{"Sec-Fetch-Site": "same-site"}) == 403
        assert send(**{"Sec-Fetch-Site": "same-origin"}) == 200
        assert (
            c.options("/api/images", headers={"Origin": "http://evil.example"}).status_code == 403
        )


def test_an_unexpected_error_is_told_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("/a/secret/path")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Guard(fails, AllowedHosts("127.0.0.1")))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()) == (
        500,
        {"error": "the server failed; its log says why"},
    )
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "/a/secret/path" in caplog.text


def test_who_leaves_amid_an_upload_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(write_index(tmp_path, pairs=16)) as address:
        host, port = httpx.URL(address).host, httpx.URL(address).port
        assert port is not None
        with socket.create_connection((host, port), timeout=60) as client:
            client.sendall(
                f"POST /api/images HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: image/png\r\n"
                "Content-Length: 100\r\nExpect: 100-continue\r\n\r\n".encode()
            )
            assert b" 100 " in client.recv(100)  # the body is being read
            client.sendall(b"\x89PNG")
    # The server has stopped, and so has ended every request.
    assert caplog.records == []
    assert "Traceback" not in capfd.readouterr().err
