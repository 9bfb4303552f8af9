"""What overlap with the training data does to accuracies (arXiv 2103.00020, Figure 17)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.report.drawing import new_figure, save_figure


@dataclass(frozen=True, kw_only=True)
class OverlapPoint:
    """One task; fractions of 1."""

    name: str
    overlap: float
    """Of its images."""

    difference: tuple[float, float, float]
    """Accuracy on overlapping minus that on clean images, and its interval's ends."""

    all_minus_clean: float
    p_value: float


_LEVELS = (
    (1e-3, "p < 0.001", "tab:red"),
    (0.05, "0.001 ≤ p < 0.05", "tab:orange"),
    (float("inf"), "p ≥ 0.05", "tab:gray"),
)


def draw_overlap(points: Sequence[OverlapPoint], without: Sequence[str], path: Path) -> None:
    """Draw differences with intervals on the left, changes of the whole accuracy on the right.

    Args:
        points: tasks with both overlapping and clean images.
        without: names of the others, which a line below the figure gives.
        path: picture to write; its ending says which kind: png, svg, pdf.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure("the overlap figure", 11, 4.6)
    left, right = figure.subplots(1, 2)
    for point in points:
        middle, low, high = (100 * value for value in point.difference)
        excludes_zero = low > 0 or high < 0
        left.errorbar(
            100 * point.overlap,
            middle,
            yerr=[[middle - low], [high - middle]],
            fmt="o",
            capsize=3,
            color="tab:red" if excludes_zero else "tab:blue",
        )
        _name(left, point, middle)
    left.set_title("red: the 99.5 % Clopper–Pearson interval excludes 0", fontsize="medium")
    left.set_ylabel("accuracy on overlapping minus on clean images, points")
    for bound, label, colour in _LEVELS:
        chosen = [p for p in points if _level(p.p_value) == bound]
        if chosen:
            x = [100 * p.overlap for p in chosen]
            y = [100 * p.all_minus_clean for p in chosen]
            right.plot(x, y, "o", color=colour, label=label)
    for point in points:
        _name(right, point, 100 * point.all_minus_clean)
    if points:
        right.legend(fontsize="small", title="one-tailed binomial test", title_fontsize="small")
    right.set_title("what the overlap adds to the accuracy reported", fontsize="medium")
    right.set_ylabel("accuracy on all minus on clean images, points")
    for axis in (left, right):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel("images found in the training data, %")
        axis.margins(x=0.25, y=0.15)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    if without:
        figure.supxlabel(f"no comparison: {', '.join(without)}", fontsize="small")
    save_figure(figure, path, dpi=110)


def _level(p_value: float) -> float:
    return next(bound for bound, *_ in _LEVELS if p_value < bound)


def _name(axis: Any, point: OverlapPoint, height: float) -> None:
    axis.annotate(
        point.name,
        (100 * point.overlap, height),
        xytext=(6, 5),
        textcoords="offset points",
        fontsize="small",
    )
