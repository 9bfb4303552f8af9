"""Generated pictures of many colours and shapes, and what may happen to a copy of one."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps


def scene(seed: int, width: int = 200, height: int = 160) -> Image.Image:
    """A picture without symmetry: a landscape of soft colours with shapes on it."""
    draws = np.random.default_rng(seed)
    soft = draws.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(soft).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(9):
        x, y = draws.uniform(0, width), draws.uniform(0, height)
        a, b = draws.uniform(8, 50, 2)
        colour = tuple(draws.integers(0, 256, 3).tolist())
        kind = draws.integers(3)
        if kind == 0:
            draw.ellipse((x - a, y - b, x + a, y + b), fill=colour)
        elif kind == 1:
            draw.rectangle((x - a, y - b, x + a, y + b), fill=colour)
        else:
            draw.polygon([(x - a, y), (x + b, y - a), (x, y + b)], fill=colour)
    return image


def encoded(image: Image.Image, form: str = "JPEG", **options: int) -> bytes:
    """An image's file."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _cut(image: Image.Image) -> Image.Image:
    """Without 5 % of width and height, half on each side."""
    width, height = image.size
    return image.crop((width // 40, height // 40, width - width // 40, height - height // 40))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "encoded again": lambda image: encoded(image, quality=50),
    "png": lambda image: encoded(image, "PNG"),
    "smaller": lambda image: encoded(image.resize((image.width // 2, image.height // 2))),
    "stretched": lambda image: encoded(image.resize((image.width, 2 * image.height))),
    "cut": lambda image: encoded(_cut(image)),
    "darker": lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.7)),
    "brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.15)),
    "paler": lambda image: encoded(ImageEnhance.Contrast(image).enhance(0.7)),
}
"""Ways in which a near-duplicate differs from its original."""


def mirrored(image: Image.Image) -> bytes:
    """Left and right exchanged: another image."""
    return encoded(ImageOps.mirror(image))
