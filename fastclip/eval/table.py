"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence

from fastclip.printing import printable


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Cells below each other, the first column to the left and the others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)
