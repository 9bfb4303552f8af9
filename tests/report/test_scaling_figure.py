"""The scaling figure shows what it is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclip.report.scaling_figure import Curve, Point, Prediction, draw_scaling

FLOPS = (1e12, 4e12, 1.6e13, 4e13)
POINTS = [
    Point(
        name=f"model {number}",
        flops=flops,
        error=0.6 - 0.1 * number,
        interval=(0.57 - 0.1 * number, 0.63 - 0.1 * number),
        seeds=(0.59 - 0.1 * number, 0.61 - 0.1 * number),
        tasks={"hard": 0.8 - 0.1 * number, "easy": 0.4 - 0.1 * number},
    )
    for number, flops in enumerate(FLOPS)
]
CURVE = Curve(
    flops=FLOPS,
    error=(0.6, 0.5, 0.4, 0.33),
    low=(0.55, 0.47, 0.37, 0.29),
    high=(0.65, 0.53, 0.43, 0.38),
    residuals=(0.01, -0.02, 0.02, -0.01),
    label="the line",
)
PREDICTION = Prediction(flops=FLOPS[-1], error=0.34, low=0.25, high=0.45)


def test_svg_names_models_tasks_and_line(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    draw_scaling(POINTS, CURVE, PREDICTION, first)
    draw_scaling(POINTS, CURVE, PREDICTION, second)
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    for word in ("model 0", "model 3", "hard", "easy", "the line", "as the others predict"):
        assert f"<!-- {word}" in text or word in text


def _orange(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return np.argwhere((pixels == (255, 127, 14)).all(axis=2))


def test_prediction_stands_where_it_is(tmp_path: Path) -> None:
    """A higher predicted error is drawn higher up; the legend's mark stays."""
    low, high = tmp_path / "low.png", tmp_path / "high.png"
    draw_scaling(POINTS, CURVE, PREDICTION, low)
    draw_scaling(POINTS, CURVE, dataclasses.replace(PREDICTION, error=0.42), high)
    assert _orange(high)[:, 0].min() <= _orange(low)[:, 0].min()
    assert not np.array_equal(_orange(high), _orange(low))


def test_each_point_has_its_residual(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 points and 4 residuals"):
        draw_scaling(POINTS[:3], CURVE, PREDICTION, tmp_path / "a.png")
    with pytest.raises(ValueError, match="0 points and 0 residuals"):
        draw_scaling([], dataclasses.replace(CURVE, residuals=()), PREDICTION, tmp_path / "a.png")


def test_one_seed_and_a_perfect_line_are_drawn(tmp_path: Path) -> None:
    points = [dataclasses.replace(point, seeds=point.seeds[:1]) for point in POINTS]
    curve = dataclasses.replace(CURVE, residuals=(0.0,) * 4)
    draw_scaling(points, curve, PREDICTION, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").height > 600
