"""Who turns image bytes into pixels: Pillow, or libjpeg-turbo and our own resampling.

Both keep one contract: the box of the image, bicubic with antialiasing, RGB, as
`fastclip.data.decode` has it with Pillow. Our resampling gives Pillow's numbers to the bit.
"""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastclip.data.decode import MAX_PIXELS, check_pixels, decode, open_image, orientation_of
from fastclip.data.transforms import Box

logger = logging.getLogger("fastclip")

DecoderName = Literal["auto", "native", "pillow"]


def _find() -> tuple[Any, Any, str]:
    """libjpeg-turbo's binding and our module, or what is missing."""
    try:
        import simplejpeg

        from fastclip.data import _native
    except ImportError as error:
        return None, None, str(error)
    return simplejpeg, _native, ""


_simplejpeg, _native, _missing = _find()

_JPEG = b"\xff\xd8\xff"
_KEPT_BYTES = 64 << 20
"""Of a thread's buffer: what larger images need is given back after each."""
_MOST_REDUCED = 8  # libjpeg's smallest DCT is one value for a block of 8 × 8


@dataclass(frozen=True)
class Encoded:
    """An image whose header has been read."""

    content: bytes
    width: int
    height: int
    """In pixels, as the image is seen."""

    picture: Image.Image | None = None
    """Pillow's, where it reads the image."""

    orientation: int = 1
    """EXIF's number of how the decoded pixels have to be turned, 1 for not at all."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height


class ImageDecoder(Protocol):
    """Reads images; for any number of threads."""

    name: ClassVar[str]

    def open(self, content: bytes) -> Encoded:
        """Read an image's header.

        Raises:
            BadSampleError: the bytes are no image, or it has too many pixels.
        """
        ...

    def decode(self, image: Encoded, box: Box, out: NDArray[np.uint8]) -> None:
        """Resize `box` of the image into `out`, [size, size, 3].

        Raises:
            BadSampleError: the pixels cannot be decoded; `out` may hold anything.
        """
        ...


def build_decoder(
    name: DecoderName,
    *,
    max_pixels: int = MAX_PIXELS,
    apply_orientation: bool = False,
    reduce_jpeg: bool = False,
) -> ImageDecoder:
    """The decoder of that name; auto is the native one, or Pillow with a warning.

    Args:
        max_pixels: larger images are bad samples.
        apply_orientation: turn images as their EXIF data says.
        reduce_jpeg: see `NativeDecoder`.

    Raises:
        ImportError: the native one was asked for and is not there.
    """
    if _missing and name != "pillow":
        if name == "native":
            raise ImportError(
                f"data.decoder=native needs simplejpeg and the compiled module ({_missing}): pip "
                "install 'fastclip-torch[train]' where there is a compiler, or set pillow"
            )
        logger.warning("images are decoded by Pillow, which is slower: %s", _missing)
        name = "pillow"
    if name == "pillow":
        return PillowDecoder(max_pixels, apply_orientation)
    return NativeDecoder(max_pixels, apply_orientation, reduce_jpeg)


class PillowDecoder:
    """Every format, by Pillow: the reference."""

    name: ClassVar[str] = "pillow"

    def __init__(self, max_pixels: int = MAX_PIXELS, apply_orientation: bool = False) -> None:
        self.max_pixels = max_pixels
        self.apply_orientation = apply_orientation

    def open(self, content: bytes) -> Encoded:
        """See `ImageDecoder`."""
        picture = open_image(
            content, max_pixels=self.max_pixels, apply_orientation=self.apply_orientation
        )
        return Encoded(content, *picture.size, picture)

    def decode(self, image: Encoded, box: Box, out: NDArray[np.uint8]) -> None:
        """See `ImageDecoder`."""
        assert image.picture is not None
        out[:] = decode(image.picture, box, out.shape[0])


class NativeDecoder:
    """JPEG by libjpeg-turbo into memory that is used again; other formats, and damage, by Pillow.

    Args:
        reduce_jpeg: let the inverse DCT halve (quarter, …) an image of which twice the pixels
            needed are left: faster for large photographs, and not the same pixels.
    """

    name: ClassVar[str] = "native"

    def __init__(
        self,
        max_pixels: int = MAX_PIXELS,
        apply_orientation: bool = False,
        reduce_jpeg: bool = False,
    ) -> None:
        self.max_pixels = max_pixels
        self.apply_orientation = apply_orientation
        self.reduce_jpeg = reduce_jpeg
        self._pillow = PillowDecoder(max_pixels, apply_orientation)
        self._thread = threading.local()

    def open(self, content: bytes) -> Encoded:
        """See `ImageDecoder`."""
        if not content.startswith(_JPEG):
            return self._pillow.open(content)
        try:
            sides = _simplejpeg.decode_jpeg_header(content)
        except ValueError:
            return self._pillow.open(content)
        height, width, colours = int(sides[0]), int(sides[1]), sides[2]
        if colours in ("CMYK", "YCCK"):
            return self._pillow.open(content)
        check_pixels(width, height, self.max_pixels)
        orientation = orientation_of(open_image(content)) if self.apply_orientation else 1
        if orientation > 4:
            width, height = height, width
        return Encoded(content, width, height, orientation=orientation)

    def decode(self, image: Encoded, box: Box, out: NDArray[np.uint8]) -> None:
        """See `ImageDecoder`."""
        if image.picture is None and self._decode(image, box, out):
            return
        if image.picture is None:
            # Pillow tells damage that can be lived with from damage that cannot.
            image = self._pillow.open(image.content)
        self._pillow.decode(image, box, out)

    def _decode(self, image: Encoded, box: Box, out: NDArray[np.uint8]) -> bool:
        """Whether libjpeg had nothing to complain about."""
        size = out.shape[0]
        width, height = image.size
        if image.orientation > 4:
            width, height = height, width
        box = _stored(box, image.orientation, width, height)
        reduction = 1
        while (
            self.reduce_jpeg
            and reduction < _MOST_REDUCED
            and min(box[2] - box[0], box[3] - box[1]) >= 4 * reduction * size
        ):
            reduction *= 2
        width, height = -(-width // reduction), -(-height // reduction)
        needed = width * height * 3 + _native.SLACK
        buffer = self._buffer(needed)
        try:
            _simplejpeg.decode_jpeg(
                image.content,
                "RGB",
                min_height=height if reduction > 1 else 0,
                min_width=width if reduction > 1 else 0,
                buffer=buffer,
            )
        except ValueError:
            return False
        # Blocks shrink exactly; the last column may stand for fewer pixels than the others.
        left, upper = box[0] / reduction, box[1] / reduction
        right, lower = min(box[2] / reduction, width), min(box[3] / reduction, height)
        turned = image.orientation != 1
        target = np.empty_like(out) if turned or not out.flags.c_contiguous else out
        self._thread.resampler.resize(
            buffer.ctypes.data,
            buffer.nbytes,
            width,
            height,
            (left, upper, right, lower),
            size,
            target.ctypes.data,
        )
        if target is not out:
            out[:] = _turned(target, image.orientation)
        return True

    def _buffer(self, needed: int) -> NDArray[np.uint8]:
        """This thread's memory, its resampler beside it."""
        own: Any = self._thread
        if not hasattr(own, "resampler"):
            own.resampler = _native.Resampler()
            own.buffer = np.empty(0, np.uint8)
        if needed > _KEPT_BYTES:
            return np.empty(needed, np.uint8)
        if own.buffer.nbytes < needed:
            own.buffer = np.empty(needed, np.uint8)
        return own.buffer


def _stored(box: Box, orientation: int, width: int, height: int) -> Box:
    """A box of the image as seen, in the pixels of width × height that the file holds."""
    left, upper, right, lower = box
    if orientation > 4:  # rows and columns are exchanged
        left, upper, right, lower = upper, left, lower, right
    if orientation in (2, 3, 7, 8):  # the file has left and right the other way round
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):  # and above and below
        upper, lower = height - lower, height - upper
    return left, upper, right, lower


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Stored pixels as they are seen."""
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    return pixels.swapaxes(0, 1) if orientation > 4 else pixels


@functools.cache
def instructions() -> str:
    """What the native resampling uses: vnni, avx2, portable, or "" where it is not built."""
    return "" if _missing else _native.Resampler().instructions
