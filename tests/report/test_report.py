"""The pictures hold what they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclip.report.contact_sheet import Hit, draw_contact_sheet
from fastclip.report.learning_curve import draw_learning_curve, read_metrics


def _hit(colour: tuple[int, int, int], right: bool) -> Hit:
    pixels = np.broadcast_to(np.array(colour, dtype=np.uint8), (16, 16, 3)).copy()
    return Hit(pixels, 0.25, right)


def test_contact_sheet_shows_images_and_frames(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    hits = [_hit((255, 0, 0), True), _hit((0, 0, 255), False)]
    draw_contact_sheet("title", [("a long text that has to be wrapped in lines " * 3, hits)], path)
    image = np.asarray(Image.open(path).convert("RGB"))
    colours = {tuple(pixel) for pixel in image.reshape(-1, 3)}
    assert {(255, 0, 0), (0, 0, 255), (0x2A, 0x9D, 0x4A), (0xD0, 0xD0, 0xD0)} <= colours
    red = np.argwhere((image == (255, 0, 0)).all(axis=2))[:, 1]
    blue = np.argwhere((image == (0, 0, 255)).all(axis=2))[:, 1]
    assert red.max() < blue.min()  # best first


def test_contact_sheet_needs_a_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw_contact_sheet("title", [], tmp_path / "sheet.png")


def test_metrics_are_read_up_to_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    path.write_text('{"step": 1\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not JSON"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError, match="nothing has been logged"):
        read_metrics(tmp_path / "none.jsonl")


def test_learning_curve_is_drawn(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 3.0, "logit_scale": 14.0, "learning_rate": 1e-3},
        {"step": 2, "loss": "inf", "logit_scale": 14.1, "learning_rate": 5e-4},
        {"step": 2, "eval/zero_shot/emoji/top1": 0.1, "eval/retrieval/p/text_to_image_r1": 0.2},
    ]
    short, tall = tmp_path / "short.png", tmp_path / "tall.png"
    draw_learning_curve(rows[:2], short)
    draw_learning_curve(rows, tall)
    assert Image.open(tall).height > Image.open(short).height
    with pytest.raises(ValueError, match="no training step"):
        draw_learning_curve(rows[2:], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("null", "line 2 is no object with a step"),
        ('{"loss": 1}', "line 2 is no object with a step"),
        ('{"step": "x"}', "line 2 is no object with a step"),
        ('{"step": 2, "loss": "x"}', "line 2: loss is a number, not 'x'"),
        ('{"step": 2, "memory_gib": true}', "line 2: memory_gib is a number, not True"),
    ],
)
def test_damaged_metrics_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": "nan", "mfu": null}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=f"metrics.jsonl, {message}"):
        read_metrics(path)
