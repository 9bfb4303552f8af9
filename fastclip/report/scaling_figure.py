"""Zero-shot error over training compute as a figure (arXiv 2103.00020, Figure 9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.report.drawing import new_figure, save_figure

_LINE, _GUESS, _SEEDS = "tab:blue", "tab:orange", "tab:gray"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model."""

    name: str
    flops: float
    """Training compute."""
    error: float
    """Mean over tasks and seeds, in (0, 1)."""
    interval: tuple[float, float]
    """That the finite number of test images leaves."""
    seeds: tuple[float, ...]
    """Mean error of each training."""
    tasks: Mapping[str, float]
    """Error of each task; the same tasks at every point."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The fitted line and its band."""

    flops: Sequence[float]
    error: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    residuals: Sequence[float]
    """log(measured) - log(fitted), of each point in turn."""
    label: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of the largest model by the others."""

    flops: float
    error: float
    low: float
    high: float


def draw_scaling(points: Sequence[Point], curve: Curve, prediction: Prediction, path: Path) -> None:
    """Draw errors and line on logarithmic axes, and the residuals below.

    Args:
        path: picture to write; its ending says which kind: png, svg, pdf.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no point, or not one residual for each.
    """
    if not points or len(points) != len(curve.residuals):
        raise ValueError(
            f"{len(points)} points and {len(curve.residuals)} residuals: there is at least one "
            "point, and a residual for each"
        )
    figure = new_figure("the scaling figure", 8, 7.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_errors(above, points, curve, prediction)
    _draw_residuals(below, points, curve)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path, dpi=130)


def _draw_errors(axis: Any, points: Sequence[Point], curve: Curve, prediction: Prediction) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    flops = [point.flops for point in points]
    for number, task in enumerate(points[0].tasks):
        errors = [point.tasks[task] for point in points]
        axis.plot(flops, errors, color=f"C{number + 2}", alpha=0.45, lw=1, marker=".", label=task)
    axis.fill_between(
        curve.flops, curve.low, curve.high, color=_LINE, alpha=0.15, lw=0, label="95 % of the line"
    )
    axis.plot(curve.flops, curve.error, color=_LINE, label=curve.label)
    for point in points:
        if len(point.seeds) > 1:
            axis.plot(
                [point.flops] * len(point.seeds), point.seeds, "_", color=_SEEDS, ms=9, zorder=4
            )
    axis.errorbar(
        flops,
        [point.error for point in points],
        yerr=_reaches([(point.error, *point.interval) for point in points]),
        fmt="o",
        color="black",
        ms=5,
        lw=1,
        capsize=3,
        label="mean error (bars: 95 % of test images; dashes: seeds)",
        zorder=5,
    )
    axis.errorbar(
        [prediction.flops * 1.06],  # beside the measured point, not under it
        [prediction.error],
        yerr=_reaches([(prediction.error, prediction.low, prediction.high)]),
        fmt="D",
        color=_GUESS,
        ms=5,
        lw=1,
        capsize=4,
        label="largest as the others predict it (95 %)",
        zorder=6,
    )
    for number, point in enumerate(points):
        above = number % 2 == 0  # neighbours' names apart, beyond the ends of their bars
        ends = (*point.seeds, *point.interval)
        axis.annotate(
            point.name,
            (point.flops, max(ends) if above else min(ends)),
            xytext=(0, 4 if above else -4),
            ha="center",
            va="bottom" if above else "top",
            textcoords="offset points",
            fontsize=7,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("zero-shot error")
    axis.grid(alpha=0.25, which="both")


def _draw_residuals(axis: Any, points: Sequence[Point], curve: Curve) -> None:
    axis.axhline(0, color=_LINE, lw=1)
    shares = [100 * math.expm1(residual) for residual in curve.residuals]
    axis.plot([point.flops for point in points], shares, "o", color="black", ms=4)
    reach = 1.25 * max(abs(share) for share in shares) or 1.0
    axis.set_ylim(-reach, reach)
    axis.set_xlabel("training compute, FLOP (forward and backward of both towers)")
    axis.set_ylabel("off the line, %")
    axis.grid(alpha=0.25)


def _reaches(rows: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """Distances below and above of (middle, low, high), as matplotlib wants them."""
    return [m - low for m, low, _ in rows], [high - m for m, _, high in rows]
