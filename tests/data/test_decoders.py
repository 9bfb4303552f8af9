"""The native decoder beside Pillow: the same pixels, for every format, damage included."""

from __future__ import annotations

import io
import logging
import resource
import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastclip.data import decoders
from fastclip.data.decode import BadSampleError
from fastclip.data.decoders import NativeDecoder, PillowDecoder, build_decoder
from fastclip.data.transforms import Box, centre_crop, random_crop

_native = pytest.importorskip("fastclip.data._native", reason="the native module is not built")
INSTRUCTIONS = ("portable", "avx2", "vnni")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise at all scales, as photographs have it."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), dtype=np.float64)
    for scale in (1, 4, 16, 64):
        small = rng.normal(size=(-(-height // scale) + 1, -(-width // scale) + 1, 3))
        large = Image.fromarray(np.uint8(np.clip(small * 40 + 128, 0, 255)))
        resized = large.resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(resized, dtype=np.float64) - 128
    return Image.fromarray(np.uint8(np.clip(total / 2 + 128, 0, 255)))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(
    decoder: NativeDecoder | PillowDecoder, content: bytes, size: int, box: Box | None = None
) -> NDArray[np.uint8]:
    image = decoder.open(content)
    out = np.full((size, size, 3), 77, dtype=np.uint8)
    decoder.decode(image, box or centre_crop(*image.size), out)
    return out


def _resampled(name: str, image: NDArray[np.uint8], box: Box, size: int) -> NDArray[np.uint8]:
    height, width, _ = image.shape
    try:
        resampler = _native.Resampler(name)
    except ValueError:
        pytest.skip(f"this machine has no {name}")
    # What lies behind the image and behind the output is poisoned.
    source = np.full(image.size + _native.SLACK, 255, dtype=np.uint8)
    source[: image.size] = image.ravel()
    out = np.full(size * size * 3 + 64, 77, dtype=np.uint8)
    resampler.resize(source.ctypes.data, source.nbytes, width, height, box, size, out.ctypes.data)
    assert (out[size * size * 3 :] == 77).all()
    return out[: size * size * 3].reshape(size, size, 3)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_resampling_is_pillows_to_the_bit(name: str) -> None:
    rng = np.random.default_rng(3)
    for number in range(250):
        width, height = (int(n) for n in rng.integers(1, 300, 2))
        height = int(rng.integers(300, 900)) if number % 7 == 0 else height
        size = int(rng.choice([1, 5, 24, 33, 100, 224]))
        left, right = np.sort(rng.uniform(0, width, 2).astype(np.float32)).tolist()
        upper, lower = np.sort(rng.uniform(0, height, 2).astype(np.float32)).tolist()
        box = (left, upper, min(right, width), min(lower, height))
        if number % 3 == 0:
            box = (0.0, 0.0, float(width), float(height))
        if box[2] - box[0] < 0.05 or box[3] - box[1] < 0.05:
            continue
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if number % 2:
            image = np.where(image > 127, 255, 0).astype(np.uint8)  # overshoots that are cut off
        expected = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
        found = _resampled(name, image, box, size)
        assert np.array_equal(found, np.asarray(expected)), (width, height, box, size)


@pytest.mark.parametrize(
    ("width", "height", "box", "size", "message"),
    [
        (4, 4, (0, 0, 5, 4), 8, "over the image's edge"),
        (4, 4, (-1, 0, 4, 4), 8, "over the image's edge"),
        (4, 4, (2, 0, 2, 4), 8, "empty"),
        (4, 4, (0, 0, float("nan"), 4), 8, "empty"),
        (0, 4, (0, 0, 1, 1), 8, "between 1 and 65536"),
        (70_000, 1, (0, 0, 1, 1), 8, "between 1 and 65536"),
        (4, 4, (0, 0, 4, 4), 0, "size is between"),
        (400, 4, (0, 0, 4, 4), 8, "buffer is too small"),
    ],
)
def test_resampling_refuses(width: int, height: int, box: Box, size: int, message: str) -> None:
    source, out = np.zeros(1000, np.uint8), np.zeros(64 * 3, np.uint8)
    with pytest.raises(ValueError, match=message):
        _native.Resampler().resize(
            source.ctypes.data, source.nbytes, width, height, box, size, out.ctypes.data
        )
    with pytest.raises(ValueError, match="no instructions of the name sse9"):
        _native.Resampler("sse9")


JPEGS: dict[str, Callable[[], bytes]] = {
    "4:2:0": lambda: encoded(photograph(301, 207), quality=85),
    "4:4:4": lambda: encoded(photograph(301, 207), quality=95, subsampling="4:4:4"),
    "4:2:2": lambda: encoded(photograph(207, 301), subsampling="4:2:2"),
    "progressive": lambda: encoded(photograph(301, 207), progressive=True),
    "tall": lambda: encoded(photograph(101, 607)),
    "small": lambda: encoded(photograph(17, 9)),
    "one pixel": lambda: encoded(photograph(1, 1)),
    "grey": lambda: encoded(photograph(99, 70).convert("L")),
    "CMYK": lambda: encoded(photograph(99, 70).convert("CMYK")),
    "restarts": lambda: encoded(photograph(99, 70), restart_marker_blocks=3),
}
OTHERS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(photograph(99, 70), "PNG"),
    "PNG, palette": lambda: encoded(photograph(99, 70).quantize(16), "PNG"),
    "PNG, alpha": lambda: encoded(_transparent(), "PNG"),
    "PNG, 16 bits": lambda: encoded(Image.fromarray(_wide()), "PNG"),
    "WebP": lambda: encoded(photograph(99, 70), "WEBP"),
    "GIF, animated": lambda: encoded(
        photograph(50, 50), "GIF", save_all=True, append_images=[photograph(50, 50, 1)]
    ),
    "BMP": lambda: encoded(photograph(99, 70), "BMP"),
    "TIFF": lambda: encoded(photograph(99, 70), "TIFF"),
}


def _transparent() -> Image.Image:
    image = photograph(99, 70).convert("RGBA")
    image.putalpha(photograph(99, 70, 1).convert("L"))
    return image


def _wide() -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, 65536, (70, 99), dtype=np.uint16)


@pytest.mark.parametrize("name", [*JPEGS, *OTHERS])
def test_every_format_has_pillows_pixels(name: str) -> None:
    content = (JPEGS | OTHERS)[name]()
    native, pillow = NativeDecoder(), PillowDecoder()
    image = native.open(content)
    assert image.size == pillow.open(content).size
    assert (image.picture is None) == (name in JPEGS and name != "CMYK")  # who decodes it
    for size in (16, 64):
        for number in range(3):
            box = random_crop(*image.size, (0.5, 1.0), 0, 0, number)
            expected = pixels(pillow, content, size, box)
            assert np.array_equal(pixels(native, content, size, box), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photograph(120, 80), quality=95, exif=exif.tobytes())
    native, pillow = NativeDecoder(apply_orientation=True), PillowDecoder(apply_orientation=True)
    image = native.open(content)
    assert image.size == ((120, 80) if orientation < 5 else (80, 120)) == pillow.open(content).size
    for number in range(4):
        box = random_crop(*image.size, (0.3, 0.9), 1, 0, number)
        found = pixels(native, content, 32, box).astype(int)
        # The passes may come in the other order, each rounded.
        assert np.abs(found - pixels(pillow, content, 32, box)).max() <= 2
    unturned = NativeDecoder().open(content)
    assert unturned.size == (120, 80)


def test_damage_is_judged_as_pillow_judges_it() -> None:
    native, pillow = NativeDecoder(), PillowDecoder()
    rng = np.random.default_rng(0)
    whole = encoded(photograph(120, 90))
    refused = agreed = 0
    for number in range(300):
        content = bytearray(whole)
        if number % 3 == 0:
            content = content[: int(rng.integers(1, len(whole)))]
        else:
            for at in rng.integers(2, len(whole), number % 3):
                content[at] = int(rng.integers(0, 256))
        expected = _pixels_or_kind(pillow, bytes(content))
        found = _pixels_or_kind(native, bytes(content))
        assert np.array_equal(found, expected)
        refused += isinstance(expected, str)
        agreed += not isinstance(expected, str)
    assert refused > 90
    assert agreed > 90


def _pixels_or_kind(
    decoder: NativeDecoder | PillowDecoder, content: bytes
) -> NDArray[np.uint8] | str:
    try:
        return pixels(decoder, content, 24)
    except BadSampleError as error:
        return error.kind


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"<html>", b"\xff\xd8\xff\xe0" * 9])
def test_what_is_no_image(content: bytes) -> None:
    with pytest.raises(BadSampleError) as caught:
        pixels(NativeDecoder(), content, 8)
    assert caught.value.kind == "broken image"


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = bytearray(encoded(Image.new("L", (8, 8))))
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xea\x60\xea\x60"  # 60,000 × 60,000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSampleError) as caught:
        NativeDecoder().open(bytes(bomb))
    assert caught.value.kind == "oversized image"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    with pytest.raises(BadSampleError, match="90×70 exceeds 6000 pixels"):
        NativeDecoder(max_pixels=6000).open(encoded(photograph(90, 70)))


def test_reduction_is_for_what_is_much_too_large() -> None:
    content = encoded(photograph(1203, 907), quality=95)
    exact, reduced = NativeDecoder(), NativeDecoder(reduce_jpeg=True)
    for size, same in ((300, True), (224, False), (50, False)):  # 907 px are 4 × 226
        a, b = pixels(exact, content, size), pixels(reduced, content, size)
        assert np.array_equal(a, b) == same
        assert np.abs(a.astype(int) - b).mean() < 3
    # Nothing moves: a ramp stays where it is, at the edge too.
    ramp = Image.fromarray(
        np.broadcast_to(np.linspace(0, 255, 1203)[None, :, None], (907, 1203, 3)).astype(np.uint8)
    )
    content = encoded(ramp, quality=100, subsampling="4:4:4")
    for box in ((0.0, 0.0, 907.0, 907.0), (296.0, 0.0, 1203.0, 907.0)):
        a, b = (pixels(d, content, 50, box).astype(float) for d in (exact, reduced))
        assert np.abs(a - b).max() <= 1.5


def test_threads_do_not_share_memory() -> None:
    decoder = NativeDecoder()
    contents = [encoded(photograph(150 + 10 * n, 120, n)) for n in range(8)]
    expected = [pixels(PillowDecoder(), content, 48) for content in contents]
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(60):
            number = (first + turn) % 8
            if not np.array_equal(pixels(decoder, contents[number], 48), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_large_image_does_not_stay_in_memory() -> None:
    decoder = NativeDecoder()
    pixels(decoder, encoded(Image.new("RGB", (6000, 5000))), 32)  # 90 MB
    assert decoder._thread.buffer.nbytes == 0
    pixels(decoder, encoded(photograph(100, 100)), 32)
    assert 0 < decoder._thread.buffer.nbytes < 100_000


def test_without_the_native_parts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="fastclip")
    assert build_decoder("auto").name == "native"
    assert not caplog.records
    monkeypatch.setattr(decoders, "_missing", "No module named 'simplejpeg'")
    assert build_decoder("auto").name == "pillow"
    assert [r.message for r in caplog.records] == [
        "images are decoded by Pillow, which is slower: No module named 'simplejpeg'"
    ]
    with pytest.raises(ImportError, match=r"data\.decoder=native needs simplejpeg"):
        build_decoder("native")
