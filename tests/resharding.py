"""Pairs of real images to be resharded, and what lies in a folder of shards."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastclip.data.shard_table import load_table
from shards import write_tar

Pair = tuple[str, dict[str, bytes]]
ORIENTATION = 0x0112
"""EXIF's tag."""


def scene(width: int, height: int, number: int = 0) -> Image.Image:
    """As smooth as a photograph, and different for each number."""
    y, x = np.mgrid[0:height, 0:width] / 16.0
    waves = [np.sin(x * (0.5 + 0.1 * c) + y + number + c) * np.cos(y * 0.7 - c) for c in range(3)]
    return Image.fromarray((127.5 + 120 * np.stack(waves, axis=2)).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", orientation: int = 1, **options: Any) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    if orientation > 1:
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    image.save(out, kind, **options)
    return out.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def psnr(a: Image.Image, b: Image.Image) -> float:
    difference = np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)
    return float(10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)))


def make_pairs(count: int) -> list[Pair]:
    """Two thirds are larger than 40 pixels; every other has metadata."""
    pairs = []
    for number in range(count):
        side = 40 if number % 3 == 0 else 64
        members = {
            "jpg": encoded(scene(side + number % 5, side, number), quality=92),
            "txt": b"photo %d" % number,
        }
        if number % 2:
            members["json"] = json.dumps({"n": number}).encode()
        pairs.append((f"{number:04d}", members))
    return pairs


PAIRS = make_pairs(40)


def write_input(folder: Path, pairs: list[Pair], per_shard: int = 7) -> Path:
    folder.mkdir(parents=True)
    for first in range(0, len(pairs), per_shard):
        write_tar(folder / f"in{first // per_shard:03d}.tar", pairs[first : first + per_shard])
    return folder


def contents(folder: Path) -> list[list[tuple[str, bytes]]]:
    """Names and bytes of all members, shard by shard."""
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = []
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members.append((member.name, file.read()))
        found.append(members)
    return found


def keys(folder: Path) -> list[str]:
    names = [name for shard in contents(folder) for name, _ in shard]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def dropped(folder: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return [(line["key"], line["kind"]) for line in lines]


def everything(folder: Path) -> dict[str, str]:
    """A hash of each file that is handed over; an index has its shard's time in it."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".fcidx":
            table = load_table(path.with_suffix(".tar"))
            parts = [table.places, table.extensions, *table.columns.values()]
            content = repr([table.keys, *(part.tolist() for part in parts)]).encode()
        elif path.is_file():
            content = path.read_bytes()
        else:
            continue
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


PAIRS = make_pairs(40)
