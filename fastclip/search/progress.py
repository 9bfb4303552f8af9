"""How far a long job is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

logger = logging.getLogger("fastclip")

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts images; a context, within which the bar is shown.

    Args:
        title: what is being done.
        total: how many there are.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self._begin = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._begin = self._said = time.monotonic()
        if self.total and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._bar.add_task(self.title, total=self.total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, error, traceback
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Count some more."""
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
            return
        now = time.monotonic()
        if self.done == self.total or now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            rate = self.done / max(now - self._begin, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            logger.info(
                "%s: %d of %d images, %.0f a second, %.0f s left",
                self.title, self.done, self.total, rate, left,
            )  # fmt: skip


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Rate(ProgressColumn):
        """Images a second."""

        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} images/s")

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
