"""Texts from data and names of files, for a terminal: they may hold anything."""

from __future__ import annotations


def printable(text: str) -> str:
    """In one line, without what would move a terminal's cursor or cannot be encoded."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def printable_lines(text: str) -> str:
    """`printable`, but for line ends and tabs."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)
