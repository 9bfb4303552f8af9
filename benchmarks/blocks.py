"""Parts of a page that programs write, between lines ``<!-- NAME: begin -->`` and ``end``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

_MARKER = re.compile(r"<!-- ([\w-]+): (?:begin|end) -->")


def markers(name: str) -> tuple[str, str]:
    """The lines before and after a block."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def fenced(text: str) -> str:
    """A text as it is, in a fence that none of its lines closes."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def with_block(page: str, name: str, text: str) -> str:
    """The page with `text` as its block `name`.

    Raises:
        ValueError: a marker is missing, or there is another of it, or the text holds one.
    """
    begin, end = markers(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page needs one line {begin} and after it one line {end}")
    if found := _MARKER.search(text):
        raise ValueError(f"the text of {name} holds the marker {found[0]}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def rewrite(path: Path, make: Callable[[], Mapping[str, str]], *, check: bool, program: str) -> int:
    """Bring a page up to date; with `check` only say whether it is.

    Args:
        make: gives the page's blocks, all of them.

    Returns:
        The exit status: 0; 1 where the page is not up to date; 2 where that cannot be said.
    """
    try:
        page = wanted = path.read_text(encoding="utf-8")
        blocks = make()
        if unknown := set(_MARKER.findall(page)) - set(blocks):
            raise ValueError(f"nothing is known of its block {', '.join(sorted(unknown))}")
        for name, text in blocks.items():
            wanted = with_block(wanted, name, text)
    except (OSError, ValueError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    if check:
        hint = "up to date" if wanted == page else f"out of date: run {program}"
        print(f"{path.name}: {hint}")
        return int(wanted != page)
    path.write_text(wanted, encoding="utf-8")
    return 0
