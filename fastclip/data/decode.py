"""Image bytes to pixels by Pillow: the reference that faster decoders are compared with."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastclip.data.transforms import Box

MAX_PIXELS = 178_956_970
"""Largest image decoded: beyond it, a file of a few kilobytes may ask for gigabytes."""


ORIENTATION = 0x0112
"""EXIF's tag."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's other readers are for what no shard should hold; EPS's would start a program."""


class BadSampleError(Exception):
    """A sample that cannot be used; `kind` groups the reasons for counting."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, str]]:
        return type(self), (self.kind, self.reason)  # it may come from another process


def open_image(
    content: bytes, *, max_pixels: int = MAX_PIXELS, apply_orientation: bool = False
) -> Image.Image:
    """Read an image's header; its pixels are decoded later.

    Args:
        apply_orientation: turn the image as its EXIF data says, so that `size` is as seen.

    Raises:
        BadSampleError: the bytes are no image, or it has more than `max_pixels`.
    """
    if not content:
        raise BadSampleError("broken image", "the file has 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        raise BadSampleError("broken image", "not an image that Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise BadSampleError("oversized image", str(error)) from None
    except Exception as error:  # decoders raise whatever their format's parser raises
        raise BadSampleError("broken image", f"{type(error).__name__}: {error}") from None
    check_pixels(*image.size, max_pixels)
    if not apply_orientation:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # see above
        raise BadSampleError("broken image", f"{type(error).__name__}: {error}") from None


def check_max_pixels(most: int) -> None:
    """Raises ValueError for a limit that Pillow would not let through."""
    if not 1 <= most <= MAX_PIXELS:
        raise ValueError(f"max_pixels is from 1 to {MAX_PIXELS}, Pillow's own limit, not {most}")


def check_pixels(width: int, height: int, most: int) -> None:
    """Raises BadSampleError for an image of more than `most` pixels."""
    if width * height > most:
        raise BadSampleError("oversized image", f"{width}×{height} exceeds {most} pixels")


def orientation_of(image: Image.Image) -> int:
    """How EXIF says that an image is to be turned, 1 to 8; 1, not at all, where it says nothing.

    Pillow has turned a TIFF when its pixels are decoded, and says so by then.
    """
    try:
        number = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF's parser raises whatever its parts raise; the pixels may be well
        return 1
    return int(number) if number in range(1, 9) else 1


def decode(image: Image.Image, box: Box, size: int) -> NDArray[np.uint8]:
    """Cut `box` out of `image` and resize it to [size, size, 3] (bicubic with antialiasing).

    Transparent images are laid over white. Animated ones give their first frame.

    Raises:
        BadSampleError: the pixels cannot be decoded.
    """
    try:
        rgb = to_rgb(image)
        if rgb.size != (size, size) or box != (0.0, 0.0, float(size), float(size)):
            rgb = rgb.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return np.asarray(rgb)
    except Exception as error:  # see open_image
        raise BadSampleError("broken image", f"{type(error).__name__}: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB; transparency over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow's own conversion clips 16 bits to 8 instead of scaling.
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")
