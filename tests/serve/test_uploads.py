"""`Uploads`, `Thumbnails` and `Work`: what is kept is bounded, and what is shown is harmless."""

from __future__ import annotations

import asyncio
import io
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastclip.data.decode import BadSampleError
from fastclip.serve.errors import RequestError
from fastclip.serve.thumbnails import Thumbnails, draw_thumbnail, whole_image
from fastclip.serve.uploads import Uploads
from fastclip.serve.work import Work
from shards import picture


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_uploads_are_kept_for_a_while() -> None:
    encoded: list[bytes] = []

    def encode(content: bytes) -> Tensor:
        encoded.append(content)
        return torch.ones(1)

    uploads = Uploads(encode, lambda content: content[:4])
    first = uploads.add(picture("red", "circle", 0, 40))
    assert uploads.add(picture("red", "circle", 0, 40)) is first
    assert len(encoded) == 1
    assert uploads.get(first.token).thumbnail == b"\x89PNG"
    others = Uploads(encode, lambda content: content).add(encoded[0])
    assert others.token != first.token  # no one else can make a token
    for size in range(41, 41 + 256):
        uploads.add(picture("red", "circle", 0, size))
    with pytest.raises(RequestError, match="not kept"):
        uploads.get(first.token)


def test_pixels_that_cannot_be_decoded() -> None:
    def encode(content: bytes) -> Tensor:
        draw_thumbnail(content, 32)
        return torch.ones(1)

    whole = _encoded(Image.effect_noise((200, 200), 50), "PNG")
    with pytest.raises(RequestError, match="damaged") as refused:
        Uploads(encode, lambda content: content).add(whole[: len(whole) // 2])
    assert refused.value.status == 400


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_thumbnails_of_every_format(kind: str) -> None:
    content = _encoded(Image.new("RGB", (900, 450), "red"), kind)
    small = Image.open(io.BytesIO(draw_thumbnail(content, 160)))
    assert (small.format, small.size) == ("WEBP", (160, 80))
    red, green, blue = small.convert("RGB").getpixel((80, 40))  # pyright: ignore
    assert red > 240
    assert max(green, blue) < 20
    shown, media_type = whole_image(content)
    if kind in ("BMP", "TIFF"):
        assert (media_type, Image.open(io.BytesIO(shown)).format) == ("image/webp", "WEBP")
    else:
        assert (media_type, shown) == (f"image/{kind.lower()}", content)


def test_thumbnails_are_as_seen() -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    small = Image.open(io.BytesIO(draw_thumbnail(_encoded(clear, "PNG"), 160))).convert("RGB")
    assert small.getpixel((20, 20)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = _encoded(Image.new("RGB", (80, 40)), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(draw_thumbnail(turned, 160))).size == (40, 80)


@pytest.mark.parametrize("content", [b"<svg/>", b"<html>", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_never_shown(content: bytes) -> None:
    with pytest.raises(BadSampleError):
        whole_image(content)
    with pytest.raises(BadSampleError):
        draw_thumbnail(content, 160)


def test_thumbnails_in_memory_are_bounded() -> None:
    read: list[int] = []

    def image(number: int) -> bytes:
        read.append(number)
        return picture("red", "circle", number % 13)

    one = len(draw_thumbnail(picture("red", "circle", 0), 160))
    thumbnails = Thumbnails(image, max_bytes=int(4.5 * one))
    for number in (0, 1, 2, 0, 3, 4, 0):
        assert thumbnails.get(number, 160)
        assert thumbnails.kept_bytes <= 4.5 * one
    assert read == [0, 1, 2, 3, 4]
    thumbnails.get(1, 160)  # the one that was longest not asked for
    assert read == [0, 1, 2, 3, 4, 1]


def test_only_so_much_waits() -> None:
    async def run() -> None:
        work = Work(threads=1, waiting=1)
        gate = threading.Event()
        first = asyncio.create_task(work.run(gate.wait))
        second = asyncio.create_task(work.run(sum, [1, 2]))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="too much to do"):
            await work.run(sum, [1])
        first.cancel()  # who asked is gone, and the thread is still busy
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="too much to do"):
            await work.run(sum, [1])
        gate.set()
        assert await second == 3
        assert await work.run(sum, [4]) == 4
        work.close()

    asyncio.run(run())


def test_an_image_that_is_gone(tmp_path: Path) -> None:
    thumbnails = Thumbnails(lambda number: (tmp_path / str(number)).read_bytes())
    with pytest.raises(FileNotFoundError):
        thumbnails.get(1, 160)
    assert thumbnails.kept_bytes == 0
