"""Accuracy under a shift of the images over accuracy without it (arXiv 2103.00020, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.report.drawing import new_figure, save_figure

_TICKS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.7,
    0.8,
    0.9,
    0.95,
    0.98,
    0.99,
    0.995,
)

_NAMED = 12
"""Points up to which each has its name beside it."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A fraction of images, and the interval that their number leaves."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class RobustnessPoint:
    """One model."""

    name: str
    group: str
    """A run's checkpoints, drawn in one colour; baselines among others are grey."""

    baseline: bool
    """Whether the line was fitted to it, too."""

    seen: Accuracy
    unseen: Accuracy


def draw_robustness(
    points: Sequence[RobustnessPoint],
    predict: Callable[[float], float] | None,
    path: Path,
    *,
    seen: str,
    unseen: str,
    note: str,
) -> None:
    """Draw the points on logit axes, with y = x and the line of the baselines.

    Accuracies of 0 and 1 are drawn at the figure's edge, where their interval begins.

    Args:
        predict: accuracy under shift that the line gives for one without; None for no line.
        path: picture to write; its ending says which kind: png, svg, pdf.
        seen, unseen: names of the tasks, for the axes.
        note: a line above the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("a robustness figure needs at least one model")
    measured = [accuracy for point in points for accuracy in (point.seen, point.unseen)]
    ends = [end for accuracy in measured for end in accuracy.interval if 0 < end < 1]
    low, high = max(0.0005, 0.8 * min(ends)), 1 - max(0.0005, 0.8 * (1 - max(ends)))
    figure = new_figure("the robustness figure", 7, 6.4)
    axis = figure.subplots()

    def place(value: float) -> float:
        return logit(min(max(value, low), high))

    grid = [place(low) + (place(high) - place(low)) * step / 100 for step in range(101)]
    axis.plot(grid, grid, color="black", linewidth=0.9, linestyle=":", label="y = x")
    if predict is not None:
        ends = place(low), place(high)
        drawn = [(x, logit(predict(_expit(x)))) for x in grid]
        line = [(x, y) for x, y in drawn if ends[0] <= y <= ends[1]]
        if line:
            x, y = zip(*line, strict=True)
            axis.plot(x, y, color="tab:gray", label="baselines, least squares in logits")
    mixed = any(not point.baseline for point in points)
    groups = list(dict.fromkeys(p.group for p in points if not (mixed and p.baseline)))
    for point in points:
        x, y = place(point.seen.value), place(point.unseen.value)
        grey = mixed and point.baseline
        colour = "tab:gray" if grey else f"C{groups.index(point.group) % 10}"
        axis.errorbar(
            x,
            y,
            xerr=_arms(point.seen, x, place),
            yerr=_arms(point.unseen, y, place),
            fmt="o" if point.baseline else "*",
            markersize=6 if point.baseline else 12,
            capsize=2,
            color=colour,
            elinewidth=0.8,
            label="baselines" if grey else point.group,
            zorder=2 if grey else 3,
        )
        if len(points) <= _NAMED:
            axis.annotate(
                point.name, (x, y), xytext=(7, -9), textcoords="offset points", fontsize="x-small"
            )
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize="small", loc="upper left")
    _ticks(axis, low, high)
    axis.set_xlabel(f"accuracy on {seen}, % (logit scale)")
    axis.set_ylabel(f"accuracy on {unseen}, % (logit scale)")
    axis.set_title(note, fontsize="medium", wrap=True)
    axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=110)


def logit(value: float) -> float:
    """log(p / (1 - p)), for p between 0 and 1."""
    return math.log(value / (1 - value))


def _expit(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def _arms(accuracy: Accuracy, middle: float, place: Callable[[float], float]) -> list[list[float]]:
    low, high = (place(end) for end in accuracy.interval)
    return [[max(0.0, middle - low)], [max(0.0, high - middle)]]


def _ticks(axis: Any, low: float, high: float) -> None:
    chosen = [tick for tick in _TICKS if low <= tick <= high]
    for each in (axis.xaxis, axis.yaxis):
        each.set_ticks([logit(tick) for tick in chosen], [f"{100 * tick:g}" for tick in chosen])
