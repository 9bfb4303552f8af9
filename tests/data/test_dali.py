"""DALI's pixels against Pillow's, and one bad image at a time."""

from __future__ import annotations

import builtins
import functools
import io
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from fastclip.data.dali import DaliDecoder, image_size, takes
from fastclip.data.decode import decode, open_image
from fastclip.data.transforms import Box, centre_crop, random_crop

pytest.importorskip(
    "nvidia.dali", reason="nvidia.dali is not installed: pip install 'fastclip-torch[dali]'"
)

SIZE = 64
BATCH = 8

PHOTOGRAPHS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg 4:2:0": ("RGB", "JPEG", {"subsampling": 2}),
    "jpeg 4:2:2": ("RGB", "JPEG", {"subsampling": 1}),
    "jpeg 4:4:4": ("RGB", "JPEG", {"subsampling": 0}),
    "jpeg progressive": ("RGB", "JPEG", {"progressive": True, "quality": 60}),
    "jpeg grey": ("L", "JPEG", {}),
    "jpeg with restarts": ("RGB", "JPEG", {"restart_marker_rows": 1}),
    "jpeg with a profile": ("RGB", "JPEG", {"icc_profile": b"profile" * 30000}),
    "png": ("RGB", "PNG", {}),
    "png grey": ("L", "PNG", {}),
    "webp": ("RGB", "WEBP", {"quality": 80}),
}

on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("mixed", marks=pytest.mark.gpu)]
)


@functools.cache
def _photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Shapes, gradients and a little noise: edges to overshoot at, areas that are smooth."""
    random = np.random.default_rng(width * 10007 + height)
    coarse = random.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    blocks = Image.fromarray(coarse[::-1]).resize((width, height), Image.Resampling.NEAREST)
    pixels = np.asarray(smooth).astype(np.int16)
    pixels[:, width // 2 :] = np.asarray(blocks)[:, width // 2 :]
    pixels += random.integers(-6, 7, pixels.shape, dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def _encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@functools.cache
def _file(kind: str, width: int, height: int) -> bytes:
    mode, name, options = PHOTOGRAPHS[kind]
    return _encoded(_photograph(width, height, mode), name, **options)


def _boxes(width: int, height: int, count: int = BATCH) -> list[Box]:
    """The whole square, the middle, then smaller and smaller ones anywhere."""
    crops = [
        random_crop(width, height, (scale, scale), 1, 0, number)
        for number, scale in enumerate(np.geomspace(1.0, 0.01, count - 1).tolist())
    ]
    return [centre_crop(width, height), *crops]


def _errors(decoder: DaliDecoder, content: bytes, boxes: list[Box]) -> np.ndarray:
    """Distance from Pillow, [boxes, size, size, 3]."""
    images, reasons = decoder.decode([content] * len(boxes), boxes)
    assert not reasons
    expected = np.stack([decode(open_image(content), box, decoder.size) for box in boxes])
    return np.abs(_rows(images).astype(np.int16) - expected)


def _rows(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).cpu().numpy()


@pytest.fixture
def decoder(device: str) -> Iterator[DaliDecoder]:
    made = DaliDecoder(SIZE, batch_size=BATCH, device=device)  # pyright: ignore[reportArgumentType]
    yield made
    made.close()


@pytest.fixture
def on_cpu() -> Iterator[DaliDecoder]:
    made = DaliDecoder(SIZE, batch_size=BATCH, device="cpu")
    yield made
    made.close()


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
@pytest.mark.parametrize("shape", [(500, 400), (333, 640), (97, 1201), (71, 67), (64, 64)])
def test_the_pixels_are_pillows(on_cpu: DaliDecoder, kind: str, shape: tuple[int, int]) -> None:
    content = _file(kind, *shape)
    assert image_size(content) == shape
    errors = _errors(on_cpu, content, _boxes(*shape))
    assert errors.mean(axis=(1, 2, 3)).max() <= 0.05
    assert errors.max() <= 12  # at the image's border, beyond which the two see other pixels
    assert np.mean(errors > 2) <= 2e-3
    assert errors[:, 3:-3, 3:-3].max() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PHOTOGRAPHS)
@pytest.mark.parametrize("shape", [(500, 400), (333, 640), (71, 67)])
def test_the_gpus_pixels_are_pillows(kind: str, shape: tuple[int, int]) -> None:
    """nvJPEG's inverse DCT rounds in its own way."""
    decoder = DaliDecoder(SIZE, batch_size=BATCH, device="mixed")
    assert _errors(decoder, _file(kind, *shape), _boxes(*shape)).mean() <= 0.5
    decoder.close()


@pytest.mark.gpu
def test_nearest_chroma_is_farther_from_pillow() -> None:
    # Red and blue stripes: all of the picture is in the chroma.
    stripes = np.zeros((400, 500, 3), dtype=np.uint8)
    stripes[:, :, 0] = 255 * (np.arange(500) // 5 % 2)
    stripes[:, :, 2] = 255 - stripes[:, :, 0]
    content = _encoded(Image.fromarray(stripes), subsampling=2, quality=90)
    means = []
    for fancy in (True, False):
        decoder = DaliDecoder(SIZE, batch_size=BATCH, device="mixed", fancy_upsampling=fancy)
        means.append(_errors(decoder, content, _boxes(500, 400)).mean())
        decoder.close()
    assert means[1] > 2 * means[0]


@pytest.mark.gpu
def test_the_gpus_pixels_are_ready_on_the_current_stream() -> None:
    decoder = DaliDecoder(SIZE, batch_size=BATCH, device="mixed")
    contents = [_file("jpeg 4:2:0", 500, 400)] * BATCH
    expected = decoder.decode(contents, _boxes(500, 400))[0].cpu()
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            images, _ = decoder.decode(contents, _boxes(500, 400))
            copy = images.clone()
        stream.synchronize()
        assert images.device == torch.device("cuda", torch.cuda.current_device())
        assert torch.equal(copy.cpu(), expected)
    decoder.close()


def test_an_image_of_the_right_size_is_untouched(on_cpu: DaliDecoder) -> None:
    image = _photograph(SIZE, SIZE)
    images, _ = on_cpu.decode([_encoded(image, "PNG")], [(0.0, 0.0, float(SIZE), float(SIZE))])
    assert np.array_equal(_rows(images)[0], np.asarray(image))


def test_boxes_are_cut_where_pillow_cuts(on_cpu: DaliDecoder) -> None:
    """Squares and others, of every size and place, in wide and in tall images."""
    random = np.random.default_rng(3)
    worst = 0.0
    for width, height in ((300, 200), (120, 500)):
        content = _encoded(_photograph(width, height), "PNG")
        for _ in range(6):
            corners = random.random((BATCH, 2, 2)) * (width, height)
            low, high = corners.min(axis=1), corners.max(axis=1) + 1e-3
            high = np.minimum(np.maximum(high, low + 0.3), (width, height))
            boxes: list[Box] = [tuple(box) for box in np.concatenate([low, high], 1).tolist()]
            worst = max(worst, _errors(on_cpu, content, boxes)[:, 8:-8, 8:-8].max())
    assert worst <= 2


def test_images_too_small_for_the_filter(on_cpu: DaliDecoder) -> None:
    for shape in ((1, 1), (3, 2), (2, 40)):
        content = _encoded(_photograph(*shape), "PNG")
        errors = _errors(on_cpu, content, [centre_crop(*shape)])
        assert errors.mean() <= 6
        assert errors.max() <= 40


def test_exif_turns_nothing(on_cpu: DaliDecoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = _encoded(_photograph(120, 80), exif=exif)
    assert image_size(content) == (120, 80)
    assert image_size(content, apply_orientation=True) is None
    assert _errors(on_cpu, content, _boxes(120, 80)).mean() <= 0.05


def test_gamma_and_profiles_change_nothing(on_cpu: DaliDecoder) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"gAMA", (100000).to_bytes(4))
    chunks.add(b"sBIT", bytes([5, 6, 5]))
    content = _encoded(_photograph(120, 80), "PNG", pnginfo=chunks, icc_profile=b"profile" * 20)
    assert takes(content)
    assert _errors(on_cpu, content, _boxes(120, 80)).mean() <= 0.05


def test_a_picture_of_several(on_cpu: DaliDecoder) -> None:
    first, second = _photograph(120, 80), _photograph(80, 120)
    content = _encoded(first, "MPO", save_all=True, append_images=[second])
    assert image_size(content) == (120, 80)
    assert _errors(on_cpu, content, _boxes(120, 80)).mean() <= 0.05


def test_batches_of_any_size_and_their_memory(on_cpu: DaliDecoder) -> None:
    content, boxes = _file("jpeg 4:2:0", 500, 400), _boxes(500, 400)
    whole, reasons = on_cpu.decode([content] * BATCH, boxes)
    assert not reasons
    assert whole.dtype == torch.uint8
    assert whole.shape == (BATCH, 3, SIZE, SIZE)
    assert whole.permute(0, 2, 3, 1).is_contiguous()
    kept = whole.clone()
    for count in (1, 3, BATCH, 2):
        part, _ = on_cpu.decode([content] * count, boxes[:count])
        assert torch.equal(part, kept[:count])
        part.fill_(7)  # what DALI uses again would show in the next ones
    assert torch.equal(whole, kept)
    on_cpu.close()
    assert torch.equal(whole, kept)


def _damaged(content: bytes) -> bytes:
    """With a JPEG's end in place, and Huffman tables that are none."""
    at = content.index(b"\xff\xc4")
    return content[: at + 5] + b"\xff" * 16 + content[at + 21 :]


@on_each_device
def test_a_bad_image_costs_its_place_alone(decoder: DaliDecoder) -> None:
    good, boxes = _file("jpeg 4:2:0", 500, 400), _boxes(500, 400)
    expected, _ = decoder.decode([good] * BATCH, boxes)
    contents = [good] * BATCH
    contents[2] = _damaged(good)
    contents[4] = good[: len(good) // 2]
    contents[5] = b"<html></html>"
    contents[7] = b""
    assert takes(contents[2])
    for _ in range(2):
        images, reasons = decoder.decode(contents, boxes)
        assert list(reasons) == [2, 4, 5, 7]
        assert reasons[2].startswith("DALI: ")
        assert reasons[4] == reasons[5] == reasons[7]
        assert reasons[5].startswith("not a JPEG, PNG or WebP")
        assert not images[list(reasons)].any()
        assert images.permute(0, 2, 3, 1).is_contiguous()
        rest = [place for place in range(BATCH) if place not in reasons]
        assert torch.equal(images[rest], expected[rest])
    again, reasons = decoder.decode([good] * BATCH, boxes)
    assert not reasons
    assert torch.equal(again, expected)


@on_each_device
def test_a_batch_of_bad_images(decoder: DaliDecoder) -> None:
    bad = _damaged(_file("jpeg grey", 71, 67))
    for contents in ([bad], [bad] * 3, [b"", b"GIF89a"]):
        images, reasons = decoder.decode(contents, [(0.0, 0.0, 9.0, 9.0)] * len(contents))
        assert list(reasons) == list(range(len(contents)))
        assert images.shape == (len(contents), 3, SIZE, SIZE)
        assert not images.any()


@pytest.mark.parametrize(
    "box",
    [(0, 0, 501, 400), (0, -1, 9, 9), (5, 5, 5, 9), (9, 0, 5, 9), (0, 0, math.nan, 9)],
)
def test_a_box_that_is_not_in_the_image(on_cpu: DaliDecoder, box: Box) -> None:
    content = _file("jpeg 4:2:0", 500, 400)
    images, reasons = on_cpu.decode([content] * 2, [(0.0, 0.0, 9.0, 9.0), box])
    assert list(reasons) == [1]
    assert "is not inside its 500×400 pixels" in reasons[1]
    assert images[0].any()


def test_a_failure_that_no_image_is_to_blame_for(
    on_cpu: DaliDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = _file("jpeg 4:2:0", 500, 400)
    run = DaliDecoder._run

    def of_batches(self: DaliDecoder, pipeline: Any, inputs: Any) -> torch.Tensor:
        if len(inputs) > 1:
            raise RuntimeError("out of memory")
        return run(self, pipeline, inputs)

    monkeypatch.setattr(DaliDecoder, "_run", of_batches)
    with pytest.raises(RuntimeError, match=r"not the batch of them .*out of memory.*smaller"):
        on_cpu.decode([content] * 2, _boxes(500, 400, 2))

    def of_any(self: DaliDecoder, pipeline: Any, inputs: Any) -> torch.Tensor:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(DaliDecoder, "_run", of_any)
    with pytest.raises(RuntimeError, match=r"decodes nothing .*the device is lost"):
        on_cpu.decode([content] * 2, _boxes(500, 400, 2))
    monkeypatch.setattr(DaliDecoder, "_run", run)
    assert not on_cpu.decode([content] * 2, _boxes(500, 400, 2))[1]


def test_arguments_are_checked(on_cpu: DaliDecoder) -> None:
    content = _file("jpeg 4:2:0", 71, 67)
    box = (0.0, 0.0, 9.0, 9.0)
    for contents, boxes in (([], []), ([content], []), ([content] * 9, [box] * 9)):
        with pytest.raises(ValueError, match=r"there are 1 to 8"):
            on_cpu.decode(contents, boxes)
    with pytest.raises(ValueError, match="size is at least 1, not 0"):
        DaliDecoder(0, batch_size=1, device="cpu")
    with pytest.raises(ValueError, match="cpu or mixed, not 'gpu'"):
        DaliDecoder(8, batch_size=1, device="gpu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="device_id=0 is for device='mixed'"):
        DaliDecoder(8, batch_size=1, device="cpu", device_id=0)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch sees none: set device='cpu'"):
        DaliDecoder(8, batch_size=1, device="mixed")


def test_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("nvidia.dali"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'fastclip-torch\[dali\]'"):
        DaliDecoder(8, batch_size=1, device="cpu")


def test_closing_stops_the_threads() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    first = DaliDecoder(SIZE, batch_size=2, device="cpu")
    first.decode([_file("jpeg 4:2:0", 71, 67)], [(0.0, 0.0, 9.0, 9.0)])
    first.close()
    before = threads()  # what DALI starts once for the process stays
    second = DaliDecoder(SIZE, batch_size=2, device="cpu", threads=4)
    second.decode([_file("jpeg 4:2:0", 71, 67)], [(0.0, 0.0, 9.0, 9.0)])
    assert threads() > before
    second.close()
    second.close()
    assert threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        second.decode([_file("jpeg 4:2:0", 71, 67)], [(0.0, 0.0, 9.0, 9.0)])


@pytest.mark.parametrize("end", ["decoder.close()", "pass", "del decoder"])
def test_a_process_ends_quietly(end: str) -> None:
    program = f"""
import io
from PIL import Image
from fastclip.data.dali import DaliDecoder
out = io.BytesIO()
Image.new("RGB", (40, 40), "red").save(out, "JPEG")
decoder = DaliDecoder(8, batch_size=2, device="cpu")
images, reasons = decoder.decode([out.getvalue()], [(0.0, 0.0, 40.0, 40.0)])
assert images.shape == (1, 3, 8, 8) and not reasons
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
