"""A real browser for tests: headless Chromium, watched for what it asks and complains of."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OWN_FOLDER = Path(sys.prefix) / "chromium"
"""Where `install_chromium.py` puts one."""

OWN_CHROMIUM = OWN_FOLDER / "run-chromium"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Watched:
    """A page and what happened on it."""

    page: Page
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, in order."""

    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console, exceptions of scripts, requests that failed."""


def find_chromium() -> str | None:
    """FASTCLIP_CHROMIUM, the one that `install_chromium.py` installed, or the machine's own."""
    named = os.environ.get("FASTCLIP_CHROMIUM")
    if named:
        return named
    if OWN_CHROMIUM.is_file():
        return str(OWN_CHROMIUM)
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


@contextmanager
def launch(executable: str) -> Iterator[Browser]:
    """The browser, with an empty profile of its own that is removed afterwards."""
    from playwright.sync_api import sync_playwright

    # Its sandbox needs rights that root and containers do not have; the pages are our own.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, headless=True, chromium_sandbox=False, args=list(_FLAGS)
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def any_browser() -> Iterator[Browser]:
    """`launch` of the one that is found; the test is skipped, with the reason, if there is none."""
    executable = find_chromium()
    if executable is None:
        reason = "no Chromium: run tests/install_chromium.py, or name one in FASTCLIP_CHROMIUM"
        print(reason)
        pytest.skip(reason)
    pytest.importorskip("playwright", reason="no Chromium: playwright is not installed")
    with launch(executable) as browser:
        yield browser


@contextmanager
def watched_page(
    browser: Browser, *, width: int = 1280, height: int = 800, dark: bool = False
) -> Iterator[Watched]:
    """A new page with cookies and storage of its own."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
    )
    context.set_default_timeout(20_000)
    page = context.new_page()
    watched = Watched(page)
    page.on("request", lambda request: watched.requests.append(request.url))
    page.on("pageerror", lambda error: watched.complaints.append(f"exception: {error}"))
    page.on(
        "console",
        lambda message: (
            watched.complaints.append(f"{message.type}: {message.text}")
            if message.type in ("error", "warning")
            else None
        ),
    )
    try:
        yield watched
    finally:
        context.close()


@contextmanager
def browser_page(*, width: int = 1280, height: int = 800, dark: bool = False) -> Iterator[Watched]:
    """`watched_page` in a browser of its own."""
    with (
        any_browser() as browser,
        watched_page(browser, width=width, height=height, dark=dark) as watched,
    ):
        yield watched


def scrolls_sideways(page: Page) -> bool:
    """Whether anything of the page lies beyond the right edge of the window."""
    return page.evaluate(
        "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    )
