"""A run's curves as SVG, to be put into a page: no fonts, styles or addresses from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

_INK = "#010203"
"""Stands for the text's colour of the page, in a dark one too."""

_COLOURS = ("#2f6fb5", "#c8642a", "#2a9d4a", "#8a55b0", "#b53a5d", "#6b7785")


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    from_zero: bool = False,
    logarithmic: bool = False,
    marked: bool = False,
) -> str:
    """Lines over a common axis, as an ``<svg>`` element.

    Args:
        lines: points (x, y) by name; y that is not finite leaves a gap. One line has no legend.
        title: what a reader hears who does not see the figure.
        x: what the horizontal axis counts.
        from_zero: the vertical axis begins at 0.
        logarithmic: the vertical axis is; for numbers above 0.
        marked: show the points themselves.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "a report's curves are drawn by matplotlib: pip install 'fastclip-torch[eval]'"
        ) from None
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fastclip",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained", facecolor="none")
        axis = figure.subplots()
        axis.set_facecolor("none")
        for number, (name, points) in enumerate(lines.items()):
            axis.plot(
                [point[0] for point in points],
                [point[1] for point in points],
                color=_COLOURS[number % len(_COLOURS)],
                linestyle="-" if number < len(_COLOURS) else "--",
                linewidth=1.4,
                marker="o" if marked else None,
                markersize=3.5,
                label=name,
            )
        if logarithmic:
            axis.set_yscale("log")
        elif from_zero:
            axis.set_ylim(bottom=0)
        axis.set_xlabel(x)
        axis.grid(alpha=0.18, color=_INK)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axis.legend(fontsize=7.5, frameon=False)
        written = io.StringIO()
        # Without these the file would name its maker's address and the day.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return _inline(written.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """The element alone, with the page's colour of text and as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1 role='img' aria-label=TITLE>", svg, count=1
    )
    svg = svg.replace("aria-label=TITLE", f"aria-label={quoteattr(title)}", 1)
    svg = svg.replace("xlink:href", "href")
    return svg.replace(_INK, "currentColor")
