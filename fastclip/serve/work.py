"""Work that takes a processor: a few threads, and only so much may wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from fastclip.serve.errors import RequestError

P = ParamSpec("P")
T = TypeVar("T")


class Work:
    """Runs functions on threads of its own. Used from one event loop.

    What holds memory while it runs is bounded by `threads`; what holds a request by `waiting`.

    Args:
        threads: functions at a time.
        waiting: functions that may wait beside those; with more, requests are refused (503).
    """

    def __init__(self, *, threads: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastclip-serve")
        self._most = threads + waiting
        self._taken = 0

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result.

        Raises:
            RequestError: too much waits already.
        """
        if self._taken >= self._most:
            raise RequestError(503, "the server has too much to do; ask again in a moment")
        self._taken += 1
        future = self._pool.submit(function, *args, **kwargs)
        # Whoever asked may leave: the place is free only when the thread is.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _on_loop(loop, self._release))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Start nothing more; what runs is waited for."""
        self._pool.shutdown(cancel_futures=True)

    def _release(self) -> None:
        self._taken -= 1


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
