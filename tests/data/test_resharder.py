"""One image made smaller: its size, pixels, orientation, and what is written of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, JpegImagePlugin

from fastclip.data.decode import BadSampleError, open_image, to_rgb
from fastclip.data.resharder import shrink, shrunk_size
from resharding import ORIENTATION, PAIRS, encoded, opened, psnr, scene


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((640, 480), 256, (341, 256)),
        ((480, 640), 256, (256, 341)),
        ((257, 257), 256, (256, 256)),
        ((256, 4000), 256, (256, 4000)),
        ((4000, 400), 256, (2560, 256)),
        ((1001, 400), 200, (501, 200)),  # halves up
        ((999, 400), 200, (500, 200)),
        ((5000, 3000), 0, (5000, 3000)),
    ],
)
def test_sizes(size: tuple[int, int], short: int, expected: tuple[int, int]) -> None:
    assert shrunk_size(*size, short) == expected


def test_shrinking_is_a_bicubic_resize_and_a_jpeg() -> None:
    image = scene(321, 210)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        content = encoded(
            image, quality=95, subsampling=subsampling, comment=b"no", icc_profile=b"p" * 50
        )
        small = shrink(content, short=100, quality=90)
        assert small is not None
        found = opened(small)
        assert found.size == (153, 100)
        assert psnr(found, opened(content).resize((153, 100), Image.Resampling.BICUBIC)) > 38
        halved = 0 if subsampling == "4:4:4" else 2
        assert JpegImagePlugin.get_sampling(found) == halved
        assert not {"exif", "icc_profile", "comment", "progressive"} & set(found.info)
        assert len(shrink(content, short=100, quality=50) or b"") < len(small)
        assert shrink(content, short=210, quality=90) is None


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16", "CMYK", "tRNS"])
def test_odd_modes_become_what_the_loader_sees(mode: str) -> None:
    image = scene(120, 90)
    options: dict[str, Any] = {}
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    elif mode == "tRNS":
        image, options = image.convert("P"), {"transparency": 3}
    else:
        image = image.convert(mode)
    content = encoded(image, "JPEG" if mode == "CMYK" else "PNG", **options)
    small = shrink(content, short=45, quality=95)
    assert small is not None
    expected = to_rgb(open_image(content)).resize((60, 45), Image.Resampling.BICUBIC)
    assert opened(small).mode == "RGB"
    assert psnr(opened(small), expected) > 30


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [scene(90, 60, n).quantize() for n in range(2)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    small = shrink(content, short=30, quality=95)
    assert small is not None
    expected = to_rgb(open_image(content)).resize((45, 30), Image.Resampling.BICUBIC)
    assert psnr(opened(small), expected) > 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_kept_or_applied(kind: str, orientation: int) -> None:
    content = encoded(scene(90, 60), kind, orientation)
    seen = ImageOps.exif_transpose(opened(content))
    sides = (30, 45) if orientation > 4 else (45, 30)
    expected = seen.convert("RGB").resize(sides, Image.Resampling.BICUBIC)

    kept = shrink(content, short=30, quality=95)
    assert kept is not None
    is_turned = kind == "TIFF"  # Pillow turns these when it decodes them
    assert opened(kept).getexif().get(ORIENTATION, 1) == (1 if is_turned else orientation)
    assert psnr(ImageOps.exif_transpose(opened(kept)), expected) > 35

    applied = shrink(content, short=30, quality=95, apply_orientation=True)
    assert applied is not None
    assert not opened(applied).getexif()
    assert opened(applied).size == sides
    assert psnr(opened(applied), expected) > 35

    small = shrink(content, short=60, quality=95, apply_orientation=True)
    if orientation == 1 or is_turned:
        assert small is None
    else:
        assert small is not None
        assert psnr(opened(small), seen) > 30
    assert shrink(content, short=60, quality=95) is None


def test_images_that_cannot_be_used() -> None:
    content = encoded(scene(90, 60))
    for bad, kind in (
        (content[: len(content) // 2], "broken image"),
        (b"", "broken image"),
        (b"<html>", "broken image"),
        (encoded(Image.new("1", (300, 80000)), "PNG"), "oversized image"),
    ):
        with pytest.raises(BadSampleError) as caught:
            shrink(bad, short=299, quality=90)
        assert caught.value.kind == kind
    with pytest.raises(BadSampleError, match="oversized"):
        shrink(content, short=30, quality=90, max_pixels=5399)


def test_want_of_memory_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr("fastclip.data.resharder.to_rgb", fail)
    with pytest.raises(MemoryError):
        shrink(PAIRS[1][1]["jpg"], short=30, quality=90)
