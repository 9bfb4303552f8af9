"""What every request passes: whose page it comes from, and which headers every answer has."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastclip.serve.errors import error_response

logger = logging.getLogger("fastclip")

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class AllowedHosts:
    """Names under which the server may be addressed.

    A page of another site can have its own name point to this machine (DNS rebinding), and is then
    of the same origin as the server to a browser. The Host header tells: it holds that name.
    An address in figures cannot be such a name.

    Args:
        host: that is listened on. A loopback one is addressed by loopback names alone. Others may
            be addressed by any address in figures, by `host` and by the machine's own names.
        more: further names.
    """

    def __init__(self, host: str, more: Iterable[str] = ()) -> None:
        self.only_loopback = is_loopback(host)
        self._names = _LOOPBACK_NAMES | {host.lower()} | {name.lower() for name in more}
        if not self.only_loopback:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def __contains__(self, header: str) -> bool:
        """Whether a Host header, with or without a port, names this server."""
        try:
            name = urlsplit(f"//{header}").hostname
        except ValueError:
            return False
        if not name or any(sign in header for sign in "@/?#\\ "):
            return False
        return name in self._names or (not self.only_loopback and _is_address(name))


def is_loopback(host: str) -> bool:
    """Whether a host that is listened on can be reached from this machine alone."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware, outside of all others.

    - 421 for a Host header that is not this server's (DNS rebinding).
    - 403 for a request that changes something or costs work and comes from another site's page.
    - 500 in words for an error that nobody expected; the log has the traceback.
    - The headers that confine the page, on every answer.
    """

    def __init__(self, app: ASGIApp, hosts: AllowedHosts) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self.hosts:
            reason = "this server is not known under that name: see --allow-host"
            await error_response(421, reason)(scope, receive, send_guarded)
            return
        if scope["method"] not in ("GET", "HEAD") and not _same_origin(headers, host):
            reason = "a page of another site may not ask this"
            await error_response(403, reason)(scope, receive, send_guarded)
            return
        try:
            await self.app(scope, receive, send_guarded)
        except ClientDisconnect:
            return  # amid a body; nobody is there to be answered
        except Exception:
            logger.exception("%s %s", scope["method"], scope["path"])
            if started:
                raise
            reason = "the server failed; its log says why"
            await error_response(500, reason)(scope, receive, send_guarded)


def _same_origin(headers: Headers, host: str) -> bool:
    """Whether a request comes from this server's page, or from no page at all."""
    origin = headers.get("origin")
    if origin is not None:
        return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
    return headers.get("sec-fetch-site", "none") in ("same-origin", "none")
