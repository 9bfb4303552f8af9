"""Images for the page: drawn anew at a few sizes, and kept in memory up to a bound."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable

from PIL import Image, ImageOps

from fastclip.data.decode import BadSampleError, open_image, to_rgb

SIZES = (160, 320, 640)
"""Longest sides, in pixels, that thumbnails can have."""

THUMBNAIL_TYPE = "image/webp"
_MAX_BYTES = 64 * 1024 * 1024
_QUALITY = 82
_SHOWN_AS_THEY_ARE = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
}


def draw_thumbnail(content: bytes, size: int) -> bytes:
    """An encoded image as a WebP whose longest side is at most `size`, over white where clear.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    try:
        image = open_image(content)
        image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at a fraction of its size
        small = to_rgb(ImageOps.exif_transpose(image))
        small.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
        out = io.BytesIO()
        small.save(out, "WEBP", quality=_QUALITY, method=2)
    except BadSampleError:
        raise
    except Exception as error:  # decoders raise whatever their format's parser raises
        raise BadSampleError("broken image", f"{type(error).__name__}: {error}") from None
    return out.getvalue()


def whole_image(content: bytes) -> tuple[bytes, str]:
    """An image for a browser, and its media type: as it is in formats that every browser draws.

    The type is the content's own, whatever the file was called, and anything else is drawn anew: a
    browser never gets a file that it might take for a page.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    with open_image(content) as image:
        kind = image.format or ""
        if kind in _SHOWN_AS_THEY_ARE:
            return content, _SHOWN_AS_THEY_ARE[kind]
        longest = max(image.size)
    return draw_thumbnail(content, min(longest, 4096)), THUMBNAIL_TYPE


class Thumbnails:
    """Thumbnails of numbered images. For any number of threads.

    Args:
        read: the encoded image of a number.
        max_bytes: of the thumbnails that are kept, the latest ones.
    """

    def __init__(self, read: Callable[[int], bytes], *, max_bytes: int = _MAX_BYTES) -> None:
        self._read = read
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        """In memory now."""
        return self._bytes

    def kept(self, number: int, size: int) -> bytes | None:
        """A thumbnail that is in memory."""
        with self._lock:
            found = self._kept.get((number, size))
            if found is not None:
                self._kept.move_to_end((number, size))
        return found

    def get(self, number: int, size: int) -> bytes:
        """A thumbnail, a WebP.

        Raises:
            BadSampleError: the image cannot be decoded.
            OSError, ValueError: it cannot be read.
        """
        found = self.kept(number, size)
        if found is not None:
            return found
        drawn = draw_thumbnail(self._read(number), size)
        with self._lock:
            if (number, size) not in self._kept:
                self._kept[number, size] = drawn
                self._bytes += len(drawn)
            while self._bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= len(oldest)
        return drawn
