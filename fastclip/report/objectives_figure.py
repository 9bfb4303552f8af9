"""Zero-shot accuracy over images processed, by objective (arXiv 2103.00020, Figure 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.report.drawing import new_figure, save_figure

# Okabe and Ito's colours, which the colour-blind tell apart, and marks for print.
_STYLES = (
    ("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#D55E00", "D"), ("#CC79A7", "v"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ObjectiveCurve:
    """Accuracies of one objective on one task; four lists of equal length."""

    images: Sequence[int]
    """Processed in training, rising."""

    mean: Sequence[float]
    """Over seeds, a fraction."""

    low: Sequence[float]
    """Where the mean's interval begins; the mean itself where there is no interval."""

    high: Sequence[float]
    """Where it ends."""


def draw_objectives(
    tasks: Mapping[str, Mapping[str, ObjectiveCurve]], chance: Mapping[str, float], path: Path
) -> None:
    """Draw one panel for each task, the first one large, with a band where seeds differ.

    Args:
        tasks: by title of the panel, the curves by name; the same names in all panels.
        chance: accuracy of guessing, by title.
        path: picture to write; its ending says which kind: png, svg, pdf.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no task or no curve, or more curves than can be told apart.
    """
    curves = max(map(len, tasks.values()), default=0)
    if not 1 <= curves <= len(_STYLES):
        raise ValueError(f"a figure shows 1 to {len(_STYLES)} objectives, not {curves}")
    figure = new_figure("the figure of objectives", 5.6 + 3.1 * (len(tasks) - 1), 4.4)
    axes = figure.subplots(
        1, len(tasks), squeeze=False, width_ratios=[1.8] + [1.0] * (len(tasks) - 1)
    )[0]
    for axis, (title, lines) in zip(axes, tasks.items(), strict=True):
        _draw_panel(axis, title, lines, chance[title])
    axes[0].set_ylabel("zero-shot top-1 accuracy, %")
    axes[0].legend(fontsize="small", frameon=False, loc="upper left")
    save_figure(figure, path, dpi=130)


def _draw_panel(axis: Any, title: str, lines: Mapping[str, ObjectiveCurve], chance: float) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for (name, curve), (colour, mark) in zip(lines.items(), _STYLES, strict=False):
        percent = [100 * value for value in curve.mean]
        axis.plot(
            curve.images, percent, color=colour, marker=mark, markersize=4, lw=1.6, label=name
        )
        axis.fill_between(
            curve.images,
            [100 * max(value, 0.0) for value in curve.low],
            [100 * min(value, 1.0) for value in curve.high],
            color=colour, alpha=0.18, lw=0,
        )  # fmt: skip
    axis.axhline(100 * chance, color="0.45", lw=1, ls=":")
    axis.annotate(
        "chance", (1, 100 * chance), xycoords=("axes fraction", "data"), xytext=(-2, 2),
        textcoords="offset points", ha="right", va="bottom", fontsize=7, color="0.45",
    )  # fmt: skip
    axis.set_xscale("log", base=2)
    ticks = sorted({image for curve in lines.values() for image in curve.images})
    axis.set_xticks(ticks[:: -(-len(ticks) // 5)])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:.0f}k"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(bottom=0)
    axis.set_xlabel("images processed")
    axis.set_title(title, fontsize="medium")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
