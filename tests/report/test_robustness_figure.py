"""The figures hold what they are given, at the edges too."""

from __future__ import annotations

import html
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fastclip.report.overlap_figure import OverlapPoint, draw_overlap
from fastclip.report.robustness_figure import (
    Accuracy,
    RobustnessPoint,
    draw_robustness,
    logit,
)


def _point(name: str, seen: float, unseen: float, baseline: bool = True) -> RobustnessPoint:
    def accuracy(value: float) -> Accuracy:
        return Accuracy(value=value, interval=(max(0, value - 0.05), min(1, value + 0.05)))

    return RobustnessPoint(
        name=name, group="run", baseline=baseline, seen=accuracy(seen), unseen=accuracy(unseen)
    )


def _drawn(path: Path) -> tuple[set[str], int]:
    """What an SVG's comments say was written in it, and how many paths it has."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    texts = {html.unescape(e.text).strip() for e in root.iter() if callable(e.tag) and e.text}
    return texts, sum(1 for e in root.iter() if str(e.tag).endswith("path"))


def test_points_lines_and_names(tmp_path: Path) -> None:
    points = [_point("one", 0.3, 0.2), _point("two", 0.6, 0.7, baseline=False)]
    draw_robustness(
        points, lambda x: x / 2, tmp_path / "a.svg", seen="near", unseen="far", note="a note"
    )
    texts, with_line = _drawn(tmp_path / "a.svg")
    assert {
        "one",
        "two",
        "y = x",
        "run",
        "baselines",
        "baselines, least squares in logits",
        "accuracy on near, % (logit scale)",
        "accuracy on far, % (logit scale)",
        "a note",
        "50",
    } <= texts
    draw_robustness(points, None, tmp_path / "b.svg", seen="near", unseen="far", note="no line")
    texts, without = _drawn(tmp_path / "b.svg")
    assert "baselines, least squares in logits" not in texts
    assert without < with_line
    alone = [_point("one", 0.3, 0.2), _point("two", 0.6, 0.7)]
    draw_robustness(alone, None, tmp_path / "c.svg", seen="near", unseen="far", note="all fitted")
    texts, _ = _drawn(tmp_path / "c.svg")
    assert "run" in texts
    assert "baselines" not in texts


def test_accuracies_of_none_and_all_are_drawn(tmp_path: Path) -> None:
    points = [_point("none", 0, 0), _point("all", 1, 1)]
    path = tmp_path / "edge.png"
    draw_robustness(points, lambda x: x, path, seen="a", unseen="b", note="n")
    assert path.stat().st_size > 1000
    draw_robustness(points, lambda x: 1e-9, path, seen="a", unseen="b", note="line out of sight")
    with pytest.raises(ValueError, match="at least one model"):
        draw_robustness([], None, path, seen="a", unseen="b", note="n")


def test_logit() -> None:
    assert logit(0.5) == 0
    assert logit(0.9) == pytest.approx(2.1972246)


def test_overlap_figure_names_levels_and_tasks(tmp_path: Path) -> None:
    points = [
        OverlapPoint(
            name=name, overlap=0.1, difference=(0.1, low, 0.2), all_minus_clean=0.01, p_value=p
        )
        for name, low, p in (("birds", 0.05, 1e-4), ("cars", -0.1, 0.2))
    ]
    draw_overlap(points, ["pets (0% overlap)"], tmp_path / "a.svg")
    texts, _ = _drawn(tmp_path / "a.svg")
    assert {"birds", "cars", "p < 0.001", "p ≥ 0.05", "no comparison: pets (0% overlap)"} <= texts
    assert "0.001 ≤ p < 0.05" not in texts
    draw_overlap([], ["pets (0% overlap)"], tmp_path / "none.svg")
    texts, _ = _drawn(tmp_path / "none.svg")
    assert "birds" not in texts
