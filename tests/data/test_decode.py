"""Pixels: modes, geometry, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastclip.data.decode import BadSampleError, decode, open_image, to_rgb
from fastclip.data.transforms import centre_crop, random_crop
from shards import evaluation_pixels


def _encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    random = np.random.default_rng(0)
    shape = (height, width, channels) if channels > 1 else (height, width)
    return random.integers(0, 256, shape, dtype=np.uint8)


def test_centre_crop_equals_resizing_and_cropping() -> None:
    image = Image.fromarray(_noise(90, 60))
    resized = image.resize((48, 32), Image.Resampling.BICUBIC)
    expected = resized.crop((8, 0, 40, 32))
    ours = evaluation_pixels(_encoded(image), 32)
    assert np.array_equal(ours, np.asarray(expected))


def test_an_image_of_the_right_size_is_untouched() -> None:
    pixels = _noise(24, 24)
    assert np.array_equal(evaluation_pixels(_encoded(Image.fromarray(pixels)), 24), pixels)


def test_random_crops_stay_inside_and_vary() -> None:
    boxes = [random_crop(37, 53, (0.3, 0.9), 1, epoch, 5) for epoch in range(300)]
    sides = [box[2] - box[0] for box in boxes]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 37
        assert 0 <= top < bottom <= 53
        assert bottom - top == pytest.approx(right - left)
    assert min(sides) >= 37 * 0.3**0.5
    assert max(sides) <= 37 * 0.9**0.5
    assert max(sides) - min(sides) > 10
    assert len(set(boxes)) == 300
    assert random_crop(37, 53, (1, 1), 1, 0, 0)[0] == 0.0  # the short side is taken whole
    assert centre_crop(10, 4) == (3.0, 0.0, 7.0, 4.0)


def test_modes_become_rgb() -> None:
    grey = Image.fromarray(_noise(8, 8, 1))
    assert np.array_equal(np.asarray(to_rgb(grey))[..., 1], np.asarray(grey))
    colour = Image.fromarray(_noise(8, 8))
    for mode in ("CMYK", "YCbCr", "HSV", "P", "1"):
        assert to_rgb(colour.convert(mode)).mode == "RGB"


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255] * 256)
    palette.info["transparency"] = 0
    assert np.asarray(to_rgb(clear)).min() == 255
    assert np.asarray(to_rgb(half)).max() == 127
    assert np.asarray(to_rgb(palette)).min() == 255


def test_sixteen_bits_are_scaled() -> None:
    wide = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    pixels = evaluation_pixels(_encoded(wide), 4)
    assert pixels.min() == pixels.max() == 0x80


def test_orientation_is_applied_only_when_asked() -> None:
    image = Image.fromarray(_noise(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    content = _encoded(image, "JPEG", exif=exif)
    assert open_image(content).size == (40, 20)
    turned = open_image(content, apply_orientation=True)
    assert turned.size == (20, 40)
    box = random_crop(*turned.size, (1.0, 1.0), 0, 0, 3)
    assert decode(turned, box, 16).shape == (16, 16, 3)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert evaluation_pixels(content, 8)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_image(content: bytes) -> None:
    with pytest.raises(BadSampleError) as caught:
        evaluation_pixels(content, 8)
    assert caught.value.kind == "broken image"


def test_a_cut_image_is_broken() -> None:
    content = _encoded(Image.fromarray(_noise(64, 64)), "JPEG")
    with pytest.raises(BadSampleError) as caught:
        evaluation_pixels(content[: len(content) // 2], 8)
    assert caught.value.kind == "broken image"


def test_oversized_images_are_refused_before_decoding() -> None:
    content = _encoded(Image.new("1", (20000, 20000)))
    with pytest.raises(BadSampleError) as caught:
        open_image(content)
    assert caught.value.kind == "oversized image"
    with pytest.raises(BadSampleError, match="exceeds 99 pixels"):
        open_image(_encoded(Image.new("RGB", (10, 10))), max_pixels=99)


def test_a_transparent_colour_of_an_rgb_image_lies_over_white() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.putpixel((0, 0), (0, 0, 255))
    pixels = evaluation_pixels(_encoded(image, transparency=(255, 0, 0)), 4)
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[1, 1].tolist() == [255, 255, 255]


def test_encoded_modes_keep_their_colour() -> None:
    grey = Image.new("L", (4, 4), 90)
    assert (evaluation_pixels(_encoded(grey), 4) == 90).all()
    clear = Image.new("LA", (4, 4), (0, 0))
    assert (evaluation_pixels(_encoded(clear), 4) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 0, 200, 0])
    palette.putpixel((0, 0), 0)
    pixels = evaluation_pixels(_encoded(palette, transparency=0), 4)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[3, 3].tolist() == [0, 200, 0]
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = evaluation_pixels(_encoded(ink, "JPEG"), 16)[8, 8].tolist()
    assert red > 230
    assert max(green, blue) < 40
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 51))
    assert (evaluation_pixels(_encoded(half, "WEBP", lossless=True), 4) == 204).all()


def test_an_animation_with_alpha_and_a_gif() -> None:
    frames = [Image.new("RGBA", (8, 8), (255, 0, 0, 0)), Image.new("RGBA", (8, 8), "blue")]
    webp = _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (evaluation_pixels(webp, 8) == 255).all()
    flat = [Image.new("RGB", (8, 8), colour) for colour in ("lime", "blue")]
    gif = _encoded(flat[0], "GIF", save_all=True, append_images=flat[1:])
    assert evaluation_pixels(gif, 8)[4, 4].tolist() == [0, 255, 0]


def test_orientation_moves_the_pixels() -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # the left half is white; turned by 90 degrees, the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    content = _encoded(Image.fromarray(pixels), exif=exif)
    turned = np.asarray(to_rgb(open_image(content, apply_orientation=True)))
    assert turned.shape == (16, 8, 3)
    assert (turned[:8] == 255).all()
    assert (turned[8:] == 0).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_says_when_it_is_cut(kind: str) -> None:
    content = _encoded(Image.fromarray(_noise(64, 64)), kind)
    assert evaluation_pixels(content, 8).shape == (8, 8, 3)
    with pytest.raises(BadSampleError) as caught:
        evaluation_pixels(content[: len(content) // 2], 8)
    assert caught.value.kind == "broken image"
    assert str(caught.value).startswith("broken image: ")


def test_the_limit_itself_is_allowed() -> None:
    content = _encoded(Image.new("RGB", (10, 10)))
    assert open_image(content, max_pixels=100).size == (10, 10)


def test_an_empty_file_says_so() -> None:
    with pytest.raises(BadSampleError, match="the file has 0 bytes"):
        open_image(b"")


def test_a_crop_of_an_image_that_has_the_right_size_is_still_cut() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8, :8] = 255
    assert (decode(Image.fromarray(pixels), (0.0, 0.0, 6.0, 6.0), 16) == 255).all()
