"""Crop boxes: inside the image, square, of the area asked for, and a function of their numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastclip.data.decode import decode
from fastclip.data.transforms import centre_crop, random_crop
from shards import evaluation_pixels

SIZES = [(1, 1), (1, 900), (3, 2), (64, 64), (333, 77), (7, 4096)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.01, 1.0), (0.4, 0.4)])
def test_random_boxes_are_squares_inside(
    width: int, height: int, scale: tuple[float, float]
) -> None:
    short = min(width, height)
    for sample in range(200):
        left, top, right, bottom = random_crop(width, height, scale, 0, 1, sample)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert right - left == pytest.approx(bottom - top, abs=1e-9)
        area = (right - left) * (bottom - top) / short**2
        assert scale[0] - 1e-9 <= area <= scale[1] + 1e-9


def test_random_boxes_reach_both_ends() -> None:
    boxes = [random_crop(300, 100, (1.0, 1.0), 5, 0, sample) for sample in range(500)]
    lefts = [left for left, _, _, _ in boxes]
    assert min(lefts) < 4
    assert max(lefts) > 196
    assert abs(sum(lefts) / 500 - 100) < 10
    assert {(top, bottom) for _, top, _, bottom in boxes} == {(0.0, 100.0)}


def test_area_and_both_offsets_are_drawn_apart() -> None:
    boxes = np.array([random_crop(100, 100, (0.2, 0.6), 5, 0, sample) for sample in range(500)])
    side = boxes[:, 2] - boxes[:, 0]
    assert len(set(side)) > 400
    draws = np.stack([side**2, boxes[:, 0] / (100 - side), boxes[:, 1] / (100 - side)])
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.15


def test_boxes_depend_on_seed_epoch_and_sample() -> None:
    def box(*numbers: int) -> tuple[float, ...]:
        return random_crop(80, 50, (0.5, 1.0), *numbers)

    assert box(1, 2, 3) == box(1, 2, 3)
    assert len({box(1, 2, 3), box(0, 2, 3), box(1, 0, 3), box(1, 2, 0), box(2, 1, 3)}) == 5


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (8, 8, (0, 0, 8, 8)),
        (10, 4, (3, 0, 7, 4)),
        (4, 9, (0, 2.5, 4, 6.5)),
    ],
)
def test_centre_boxes(width: int, height: int, box: tuple[float, ...]) -> None:
    assert centre_crop(width, height) == box


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (192, 64)])
def test_cutting_then_resizing_is_resizing_then_cutting(width: int, height: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    out = io.BytesIO()
    image.save(out, "PNG")
    small = image.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    left, top = (width // 2 - 32) // 2, (height // 2 - 32) // 2
    expected = np.asarray(small.crop((left, top, left + 32, top + 32))).astype(int)
    # Each side of the box cuts the filter's support off, which is seen in the outermost pixels.
    inner = np.abs(evaluation_pixels(out.getvalue(), 32) - expected)[2:-2, 2:-2]
    assert inner.max() <= 1


def test_an_extreme_box_decodes() -> None:
    for width, height in SIZES:
        image = Image.new("RGB", (width, height), (9, 8, 7))
        pixels = decode(image, random_crop(width, height, (0.01, 0.01), 0, 0, 0), 16)
        assert (pixels == (9, 8, 7)).all()
