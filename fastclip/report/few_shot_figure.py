"""The figure "zero-shot equals k-shot" (arXiv 2103.00020, figure 6)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.report.drawing import new_figure, save_figure

_COLOURS = ("#2f6fb5", "#c8642a", "#2a9d4a", "#8a55b0", "#b53a5d", "#6b7785")
_AVERAGE = "#111111"


@dataclass(frozen=True, kw_only=True)
class FewShotCurve:
    """One data set's line; values are fractions."""

    name: str

    zero_shot: float

    shots: Mapping[int, tuple[float, float, float]]
    """Mean, and bounds of its interval, by the number of images of each class."""

    equal_shots: float | None = None
    """The number at which they meet, where it is known."""


def draw_few_shot(curves: Sequence[FewShotCurve], path: Path) -> None:
    """Draw the curves, and of several their average over the numbers that all of them have.

    The axis of k is logarithmic, with zero-shot one octave before one shot: a star there, and a
    line on its level to be compared with.

    Args:
        path: .png or .svg to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or the path ends otherwise.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"a figure is written as .png or .svg, not {path.name}")
    if not curves or not all(curve.shots for curve in curves):
        raise ValueError("a few-shot figure needs a data set, and each a number of shots")
    figure = new_figure("the few-shot figure", 7.2, 4.6)
    axis = figure.subplots()
    faint = len(curves) > 1
    for number, curve in enumerate(curves):
        _draw(axis, curve, _COLOURS[number % len(_COLOURS)], faint)
    if faint:
        _draw(axis, average(curves), _AVERAGE, False)
    numbers = sorted({k for curve in curves for k in curve.shots})
    axis.set_xticks([0.0, *map(_place, numbers)], ["0", *map(str, numbers)])
    axis.set_xlabel("labelled training images of each class")
    axis.set_ylabel("value, %")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize="small", frameon=False, loc="lower right")
    save_figure(figure, path, dpi=130, text=True)


def average(curves: Sequence[FewShotCurve]) -> FewShotCurve:
    """The mean over data sets, of the numbers of shots that all have; without an interval.

    Raises:
        ValueError: they have no number in common.
    """
    common = set.intersection(*(set(curve.shots) for curve in curves))
    if not common:
        raise ValueError("the data sets have no number of shots in common: there is no average")
    means = {k: statistics.fmean(curve.shots[k][0] for curve in curves) for k in sorted(common)}
    return FewShotCurve(
        name="average",
        zero_shot=statistics.fmean(curve.zero_shot for curve in curves),
        shots={k: (mean, mean, mean) for k, mean in means.items()},
    )


def _draw(axis: Any, curve: FewShotCurve, colour: str, faint: bool) -> None:
    numbers = sorted(curve.shots)
    places = [_place(k) for k in numbers]
    mean, low, high = ([100 * curve.shots[k][i] for k in numbers] for i in range(3))
    alpha = 0.55 if faint else 1.0
    label = curve.name
    if curve.equal_shots is not None:
        label += f", zero-shot = {curve.equal_shots:.1f} shots"
    axis.plot(places, mean, color=colour, alpha=alpha, marker="o", markersize=4, label=label)
    axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    level = 100 * curve.zero_shot
    axis.axhline(level, color=colour, alpha=alpha, linestyle=":", linewidth=1)
    axis.plot([0.0], [level], color=colour, alpha=alpha, marker="*", markersize=13)


def _place(k: int) -> float:
    return 1.0 + math.log2(k)
