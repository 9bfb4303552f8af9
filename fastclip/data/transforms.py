"""Which part of an image is seen: one explicit box per sample, whatever decodes it."""

from __future__ import annotations

import math

from fastclip.data.plan import uniform

Box = tuple[float, float, float, float]
"""Left, upper, right, lower in source pixels."""


def random_crop(
    width: int, height: int, scale: tuple[float, float], seed: int, epoch: int, sample: int
) -> Box:
    """The paper's only augmentation: a random square crop of the image resized to its short side.

    Cutting a square of the short side's length at a random place and resizing it is that crop, up
    to rounding, in one step.

    Args:
        scale: range of the crop's area over that square's; (1, 1) is the paper's.
        seed, epoch, sample: what the crop depends on, and nothing else.
    """
    low, high = scale
    share = low + (high - low) * uniform(seed, epoch, sample, 2)
    side = min(width, height) * math.sqrt(share)
    left = (width - side) * uniform(seed, epoch, sample, 3)
    top = (height - side) * uniform(seed, epoch, sample, 4)
    # Rounding may not carry a box over the edge: Pillow refuses that.
    return (left, top, min(left + side, float(width)), min(top + side, float(height)))


def centre_crop(width: int, height: int) -> Box:
    """The largest square in the middle, for evaluation."""
    side = float(min(width, height))
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)
