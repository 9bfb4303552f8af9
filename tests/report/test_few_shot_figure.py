"""The few-shot figure shows what it is given."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclip.report.few_shot_figure import FewShotCurve, average, draw_few_shot

PETS = FewShotCurve(
    name="pets",
    zero_shot=0.5,
    shots={1: (0.3, 0.25, 0.35), 4: (0.55, 0.5, 0.6), 16: (0.7, 0.68, 0.72)},
    equal_shots=3.25,
)
SIGNS = FewShotCurve(name="signs", zero_shot=0.2, shots={1: (0.1, 0.0, 0.2), 4: (0.3, 0.2, 0.4)})


def test_average_is_over_what_all_have() -> None:
    mean = average([PETS, SIGNS])
    assert mean.zero_shot == pytest.approx(0.35)
    assert {k: shots[0] for k, shots in mean.shots.items()} == pytest.approx({1: 0.2, 4: 0.425})
    with pytest.raises(ValueError, match="no number of shots in common"):
        average([PETS, FewShotCurve(name="x", zero_shot=0.1, shots={2: (0.1, 0.1, 0.1)})])


def test_svg_names_everything_and_stays_the_same(tmp_path: Path) -> None:
    draw_few_shot([PETS, SIGNS], tmp_path / "a.svg")
    draw_few_shot([PETS, SIGNS], tmp_path / "b.svg")
    svg = (tmp_path / "a.svg").read_text()
    texts = re.findall(r">([^<>\s][^<>]*)</text>", svg)
    assert {"pets, zero-shot = 3.2 shots", "signs", "average", "0", "1", "4", "16"} <= set(texts)
    assert svg == (tmp_path / "b.svg").read_text()


def test_one_data_set_has_no_average(tmp_path: Path) -> None:
    draw_few_shot([PETS], tmp_path / "one.svg")
    assert "average" not in (tmp_path / "one.svg").read_text()


def test_png_shows_the_colours(tmp_path: Path) -> None:
    draw_few_shot([PETS], tmp_path / "one.png")
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    assert ((pixels == (0x2F, 0x6F, 0xB5)).all(axis=2)).sum() > 200  # line, points and star


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"as \.png or \.svg, not a\.gif"):
        draw_few_shot([PETS], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="needs a data set"):
        draw_few_shot([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="needs a data set"):
        draw_few_shot([FewShotCurve(name="x", zero_shot=0.1, shots={})], tmp_path / "a.png")
