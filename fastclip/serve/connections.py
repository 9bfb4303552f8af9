"""How the server holds connections: so many, and none for a client that asks nothing."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

_CONNECTIONS = 64
"""Each may hold an image that is being sent."""


class PromptProtocol(H11Protocol):
    """HTTP/1.1 whose request heads must arrive in time.

    All connections count towards the limit, those that send nothing as well, and uvicorn's own
    timeout begins with the first answer and ends with the next byte. Here one whose client has not
    completed a head after `head_seconds` is closed, however many bytes have come. The time runs
    while no request is being answered: from the connection's start, and after an answer from the
    next byte on (until then uvicorn's timeout runs). A body that is being read has its own time,
    see `read_body`.
    """

    head_seconds: ClassVar[float] = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._deadline is None:  # a further byte of a head does not prolong its time
            # Aborted, not closed: closing would wait for a client that does not read.
            self._deadline = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def server_config(
    app: ASGIApp,
    *,
    protocol: type[H11Protocol] = PromptProtocol,
    connections: int = _CONNECTIONS,
) -> uvicorn.Config:
    """How uvicorn serves the application.

    Args:
        connections: how many there may be; a request on a further one is answered with 503.
    """
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",  # they would leave the protocol and its count
        log_level="warning",
        access_log=False,  # queries are nobody's business
        server_header=False,
        limit_concurrency=connections + 1,  # uvicorn refuses at the limit, not beyond it
        timeout_graceful_shutdown=3,
    )
