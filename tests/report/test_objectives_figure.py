"""The figure of objectives is written as it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastclip.report.objectives_figure import ObjectiveCurve, draw_objectives

CURVE = ObjectiveCurve(images=[1000, 2000], mean=[0.1, 0.2], low=[0.05, 0.2], high=[0.15, 0.2])


def test_png_and_svg(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    draw_objectives({"emoji": {"first": CURVE}}, {"emoji": 0.01}, one)
    tasks = {name: {"first": CURVE, "second": CURVE} for name in ("emoji", "flags")}
    draw_objectives(tasks, dict.fromkeys(tasks, 0.01), two)
    assert Image.open(two).width > Image.open(one).width
    drawn = []
    for name in ("a.svg", "b.svg"):
        draw_objectives(tasks, dict.fromkeys(tasks, 0.01), tmp_path / name)
        drawn.append((tmp_path / name).read_text())
    assert drawn[0] == drawn[1]
    for text in ("second", "chance", "images processed", "flags"):
        assert f"<!-- {text}" in drawn[0]


def test_too_many_or_none(tmp_path: Path) -> None:
    for curves in ({}, {str(number): CURVE for number in range(6)}):
        with pytest.raises(ValueError, match="1 to 5 objectives"):
            draw_objectives({"emoji": curves}, {"emoji": 0.1}, tmp_path / "f.png")
