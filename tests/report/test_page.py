"""The report's page escapes what it is given and shows all of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from browser import browser_page, scrolls_sideways
from fastclip.report.figures import line_chart
from fastclip.report.page import (
    Confusion,
    Figure,
    Matrix,
    RetrievalPart,
    RunPage,
    ZeroShotPart,
    picture,
    render,
)
from fastclip.report.run_curves import evaluation_curves, speed_curves, training_curves

HOSTILE = "<script>alert('x')</script>\"&"
SHOT = picture(np.zeros((200, 200, 3), np.uint8), score=0.25, right=True, name=HOSTILE)


def _page() -> RunPage:
    matrix = Matrix([HOSTILE, "b"], [HOSTILE, "b"], [[3, 1], [0, 2]], 0, [[0.75, 0.25], [0, 1]])
    heat = dataclasses.replace(matrix, columns=(), digits=2, pictures=[SHOT, SHOT])
    task = ZeroShotPart(
        HOSTILE, 6, 2, 5 / 6, 1.0, [Confusion(HOSTILE, "b", 1, 4, SHOT)], matrix, [("b", [SHOT])]
    )
    pairs = RetrievalPart(
        HOSTILE, [("way", [0.1, 0.2, 0.3])], 6, 2, [(HOSTILE, [SHOT])],
        [(SHOT, [(HOSTILE, 0.5, True), ("b", 0.25, False)])], heat,
    )  # fmt: skip
    return RunPage(
        title=HOSTILE,
        subtitle=HOSTILE,
        facts=[(HOSTILE, HOSTILE)],
        curves=[Figure(HOSTILE, line_chart({HOSTILE: [(1, 2.0)], "b": []}, title=HOSTILE, x="x"))],
        speed=[],
        zero_shot=[task],
        retrieval=[pairs],
        launches=[(HOSTILE, "0", HOSTILE, HOSTILE, HOSTILE)],
        versions=[(HOSTILE, HOSTILE)],
        config=HOSTILE,
        notes=[HOSTILE],
    )


def test_every_text_is_escaped() -> None:
    text = render(_page())
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 20
    assert "83.33%" in text
    assert "1 of 4 images" in text
    assert text.count("✓ ") == 1 + 1  # the style's, and the right text's


def test_a_picture_is_small_and_inside() -> None:
    assert SHOT.source.startswith("data:image/webp;base64,")
    assert len(SHOT.source) < 1000


def test_a_chart_has_nothing_from_outside() -> None:
    svg = line_chart(
        {"a": [(1, 2.0), (2, float("nan")), (3, 4.0)], "b": [(1, 1.0)]}, title='"t"', x="step"
    )
    assert svg.startswith("<svg viewBox=")
    assert "aria-label='\"t\"'" in svg
    assert "http" not in svg
    assert "<style" not in svg
    assert "currentColor" in svg
    assert not re.search(r"url\((?!#)", svg)
    assert line_chart({"a": [(1, 2.0)]}, title="t", x="x") == line_chart(
        {"a": [(1, 2.0)]}, title="t", x="x"
    )


def test_curves_are_those_that_have_numbers() -> None:
    rows = [
        {"step": 1, "loss": 3.0, "learning_rate": 0.1, "mfu": None, "data_wait": 0.5},
        {"step": 2, "loss": "nan", "learning_rate": 0.1, "mfu": None, "data_wait": 0.25},
        {"step": 1, "eval/zero_shot/a/top1": 0.5, "eval/retrieval/p/image_to_text_r1": 0.5},
        {"step": 2, "eval/zero_shot/a/top1": 0.75},
    ]
    assert [figure.title for figure in training_curves(rows)] == ["Loss", "Learning rate"]
    assert [figure.title for figure in speed_curves(rows)] == ["Waiting for data, % of the time"]
    assert [figure.title for figure in evaluation_curves(rows)] == ["Zero-shot top-1, %"]


def test_fields_of_the_page_are_all_used() -> None:
    """A field that the template forgets would be lost without a word."""
    marks = {f.name: f"mark-{f.name}" for f in dataclasses.fields(RunPage) if f.type == "str"}
    assert set(marks) >= {"title", "subtitle", "config"}
    text = render(dataclasses.replace(_page(), **marks))
    for mark in marks.values():
        assert mark in text


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"fastclip-torch\[eval\]"):
        render(_page())


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_a_browser_asks_nobody_for_anything(tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(_page()), encoding="utf-8")
    with browser_page(width=width, dark=dark) as watched:
        watched.page.goto(path.as_uri())
        watched.page.wait_for_load_state("networkidle")
        asked = [each for each in watched.requests if not each.startswith("data:")]
        assert asked == [path.as_uri()]
        assert watched.complaints == []
        assert not scrolls_sideways(watched.page)
        assert watched.page.locator("img").evaluate_all(
            "images => images.length > 3 && images.every(image => image.naturalWidth === 96)"
        )
        assert watched.page.locator("figure svg path").count() > 3
        ink = watched.page.locator("figure svg text").first.evaluate(
            "e => getComputedStyle(e).fill"
        )
        assert ink == ("rgb(230, 232, 234)" if dark else "rgb(29, 33, 38)")
