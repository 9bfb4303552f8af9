"""Texts and the images a model finds for them, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_CELL = 96
_MARGIN = 8
_TEXT_WIDTH = 250
_RIGHT, _WRONG, _INK = "#2a9d4a", "#d0d0d0", "#202020"


@dataclass(frozen=True)
class Hit:
    """One image that was found for a text."""

    pixels: NDArray[np.uint8]
    """[R, R, 3]."""

    score: float
    """Cosine similarity."""

    right: bool
    """Whether the image shows what the text says."""


def draw_contact_sheet(title: str, rows: Sequence[tuple[str, Sequence[Hit]]], path: Path) -> None:
    """Write a PNG: a row per text, its images from left to right, the right ones framed in green.

    Args:
        title: a line at the top.
        rows: (text, hits in falling order of their scores); every row has as many hits.
        path: PNG to write.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one text")
    columns = max(len(hits) for _, hits in rows)
    step = _CELL + _MARGIN
    size = (_TEXT_WIDTH + columns * step + _MARGIN, 34 + len(rows) * (step + 12) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=font)
    for row, (text, hits) in enumerate(rows):
        top = 34 + row * (step + 12)
        for line, part in enumerate(_wrapped(draw, text, font, _TEXT_WIDTH - 2 * _MARGIN)[:4]):
            draw.text((_MARGIN, top + 20 + 19 * line), part, fill=_INK, font=font)
        for column, hit in enumerate(hits):
            left = _TEXT_WIDTH + column * step
            image = Image.fromarray(hit.pixels).resize((_CELL - 8, _CELL - 8))
            frame = _RIGHT if hit.right else _WRONG
            draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=frame, width=3)
            sheet.paste(image, (left + 4, top + 4))
            draw.text((left + 2, top + _CELL), f"{hit.score:.3f}", fill=_INK, font=small)
    sheet.save(path)


def _wrapped(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
