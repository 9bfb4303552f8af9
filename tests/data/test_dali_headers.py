"""Which files go to DALI, told by their headers; DALI itself need not be there."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastclip.data.dali import DaliDecoder, image_size, takes
from fastclip.data.decode import open_image
from fastclip.data.transforms import centre_crop

WIDTH, HEIGHT = 71, 67


def _encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def _animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


def _png_with(name: bytes, content: bytes) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add(name, content)
    return _encoded("PNG", pnginfo=chunks)


def _but(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new, 1)


JPEG = _encoded("JPEG", subsampling=0)
PNG = _encoded("PNG")
WEBP = _encoded("WEBP")

TAKEN = {
    "jpeg 4:4:4": JPEG,
    "jpeg 4:2:2": _encoded("JPEG", subsampling=1),
    "jpeg 4:2:0": _encoded("JPEG", subsampling=2),
    "jpeg progressive": _encoded("JPEG", progressive=True),
    "jpeg grey": _encoded("JPEG", "L"),
    "jpeg with restarts": _encoded("JPEG", restart_marker_rows=1),
    "jpeg with filling": _but(JPEG, b"\xff\xdb", b"\xff\xff\xff\xdb"),
    "jpeg with a profile": _encoded("JPEG", icc_profile=b"\xff\xc3" * 90000),
    "jpeg with a comment": _encoded("JPEG", comment=b"\xff\xda in a comment"),
    "jpeg and garbage": JPEG + b"\0garbage\n",
    "png": PNG,
    "png grey": _encoded("PNG", "L"),
    "png with gamma": _png_with(b"gAMA", (100000).to_bytes(4)),
    "png that speaks of transparency": _png_with(b"tEXt", b"Comment\0tRNS"),
    "webp": WEBP,
}
REFUSED = {
    "empty": b"",
    "html": b"<html></html>",
    "jpeg cut": JPEG[:-200],
    "jpeg cut in its header": JPEG[:50] + b"\xff\xd9",
    "jpeg without a frame": _but(JPEG, b"\xff\xc0", b"\xff\xfe"),
    "jpeg out of step": _but(JPEG, b"\xff\xdb\0\x43", b"\xff\xdb\0\x44"),
    "jpeg CMYK": _encoded("JPEG", "CMYK"),
    "jpeg RGB": _encoded("JPEG", keep_rgb=True),
    "jpeg 4:1:1": _but(JPEG, b"\x03\x01\x11\x00", b"\x03\x01\x41\x00"),
    "jpeg of 12 bits": _but(JPEG, b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
    "jpeg lossless": _but(JPEG, b"\xff\xc0", b"\xff\xc3"),
    "jpeg arithmetic": _but(JPEG, b"\xff\xc0", b"\xff\xc9"),
    "jpeg of no height": _but(JPEG, b"\x08\0\x43\0\x47", b"\x08\0\0\0\x47"),
    "png cut": PNG[:-200],
    "png without pixels": PNG[:33] + PNG[-12:],
    "png RGBA": _encoded("PNG", "RGBA"),
    "png LA": _encoded("PNG", "LA"),
    "png palette": _encoded("PNG", "P"),
    "png palette with transparency": _encoded("PNG", "P", transparency=0),
    "png 1 bit": _encoded("PNG", "1"),
    "png 16 bits": _encoded("PNG", "I;16"),
    "png transparent colour": _encoded("PNG", transparency=(1, 2, 3)),
    "png transparent grey": _encoded("PNG", "L", transparency=3),
    "png interlaced": PNG[:28] + b"\1" + PNG[29:],
    "png animated": _animation("PNG"),
    "webp cut": WEBP[:-200],
    "webp lossless": _encoded("WEBP", lossless=True),
    "webp with alpha": _encoded("WEBP", "RGBA"),
    "webp with exif": _encoded("WEBP", exif=Image.Exif().tobytes()),
    "webp animated": _animation("WEBP"),
    "gif": _encoded("GIF"),
    "gif animated": _animation("GIF"),
    "bmp": _encoded("BMP"),
    "tiff": _encoded("TIFF"),
    "another RIFF": b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 40,
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_dali_takes(kind: str) -> None:
    assert takes(TAKEN[kind])
    assert image_size(TAKEN[kind]) == open_image(TAKEN[kind]).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", TAKEN)
def test_dali_decodes_what_it_takes(kind: str) -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")
    decoder = DaliDecoder(8, batch_size=1, device="cpu")
    assert not decoder.decode([TAKEN[kind]], [centre_crop(WIDTH, HEIGHT)])[1]
    decoder.close()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_left_to_others(kind: str) -> None:
    assert not takes(REFUSED[kind])


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
def test_formats_that_not_every_pillow_writes(kind: str) -> None:
    if kind not in Image.SAVE:
        Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    assert not takes(_encoded(kind))


@pytest.mark.parametrize("kind", TAKEN)
def test_headers_cut_anywhere_are_refused(kind: str) -> None:
    content = TAKEN[kind]
    for end in range(min(len(content) - 64, 900)):
        assert not takes(content[:end])


def test_what_may_have_to_be_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    words = PngImagePlugin.PngInfo()
    words.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    for content in (
        _encoded("JPEG", exif=exif),
        _encoded("JPEG", xmp=b"<x:xmpmeta/>"),
        _encoded("PNG", exif=exif),
        _encoded("PNG", pnginfo=words),
    ):
        assert image_size(content) == (WIDTH, HEIGHT)
        assert not takes(content, apply_orientation=True)
    for content in (JPEG, PNG, WEBP):
        assert takes(content, apply_orientation=True)
