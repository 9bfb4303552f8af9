"""Parts of a page that programs write, between lines ``<!-- NAME: begin -->`` and ``end``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    """The lines before and after a block."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def with_block(page: str, name: str, text: str) -> str:
    """The page with `text` as its block `name`.

    Raises:
        ValueError: a marker is missing, or there is another of it.
    """
    begin, end = markers(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page needs one line {begin} and after it one line {end}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def rewrite(path: Path, blocks: Mapping[str, str], *, check: bool, program: str) -> int:
    """Bring a page up to date; with `check` only say whether it is. Gives the exit status."""
    page = wanted = path.read_text(encoding="utf-8")
    try:
        for name, text in blocks.items():
            wanted = with_block(wanted, name, text)
    except ValueError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    if check:
        hint = "up to date" if wanted == page else f"out of date: run {program}"
        print(f"{path.name}: {hint}")
        return int(wanted != page)
    path.write_text(wanted, encoding="utf-8")
    return 0
