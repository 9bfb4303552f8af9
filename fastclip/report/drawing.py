"""How figures are begun and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_figure(what: str, width: float, height: float) -> Any:
    """An empty matplotlib Figure of `width` by `height` inches.

    Args:
        what: it is, for the error.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            f"{what} is drawn by matplotlib: pip install 'fastclip-torch[eval]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, *, dpi: int, text: bool = False) -> None:
    """Write a figure; equal figures make equal files.

    Args:
        path: its ending says which kind: png, svg, pdf.
        dpi: of a png.
        text: let an svg hold its letters as text, not as outlines.
    """
    from matplotlib import rc_context

    style: dict[Any, Any] = {"svg.hashsalt": "fastclip", "svg.fonttype": "none" if text else "path"}
    with rc_context(style):
        figure.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)
