"""Small real shards for tests: coloured shapes that can be told apart, with their captions."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fastclip.data.decode import decode, open_image
from fastclip.data.transforms import centre_crop

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle", "bar")


def picture(colour: str, shape: str, shift: int, size: int = 72) -> bytes:
    """A PNG of one shape."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    low, high = 10 + shift, 50 + shift
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=colour)
    elif shape == "triangle":
        draw.polygon([(low, high), (high, high), ((low + high) // 2, low)], fill=colour)
    else:
        draw.rectangle((low, 30, high, 38), fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def evaluation_pixels(content: bytes, size: int) -> NDArray[np.uint8]:
    """Centre square of an image, [size, size, 3], as Pillow has it."""
    image = open_image(content)
    return decode(image, centre_crop(*image.size), size)


def sample(index: int) -> tuple[str, dict[str, bytes]]:
    """Key and members of sample `index`; 24 labels, repeating."""
    colour = COLOURS[index % len(COLOURS)]
    shape = SHAPES[index // len(COLOURS) % len(SHAPES)]
    label = f"{colour} {shape}"
    names = [f"{c} {s}" for s in SHAPES for c in COLOURS]
    about = {"label": label, "label_id": names.index(label)}
    members = {
        "png": picture(colour, shape, index % 13),
        "txt": f"a {label}".encode(),
        "json": json.dumps(about).encode(),
    }
    return f"{index:06d}", members


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """Write samples as one WebDataset shard."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(directory: Path, pairs: int = 48, per_shard: int = 16) -> Path:
    """A folder of shards, and `classes.json` for its zero-shot task beside them."""
    shards = directory / "shards"
    shards.mkdir(parents=True)
    for first in range(0, pairs, per_shard):
        rows = [sample(i) for i in range(first, min(first + per_shard, pairs))]
        write_tar(shards / f"{first // per_shard:05d}.tar", rows)
    classes = {
        "name": "shapes",
        "label_field": "label",
        "classes": sorted(f"{c} {s}" for c in COLOURS for s in SHAPES),
    }
    (directory / "classes.json").write_text(json.dumps(classes))
    return shards


def loader_threads() -> list[str]:
    """Names of the training loaders' threads that live."""
    ours = ("fastclip-loader", "fastclip-batches")
    return [t.name for t in threading.enumerate() if t.name.startswith(ours)]
