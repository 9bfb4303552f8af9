"""JPEGs of real photographs, in the sizes that web data come in, made anew from a Debian package.

small: 512 of 400 to 640 px, as img2dataset leaves them; large: 96 of 1000 to 1600 px; shrunk: the
small ones with a short side of 256 px. Pieces of twelve photographs, so that they have the
frequencies of photographs; one in ten is progressive, 85 % have halved chroma.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

from PIL import Image

from fastclip.data.demo_debian import DebianPackage, unpack

PHOTOGRAPHS = DebianPackage(
    "mate-backgrounds",
    "1.26.0-1",
    "mate-backgrounds_1.26.0-1_all.deb",
    "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
    "CC-BY-SA-4.0",
    "photographs, 12 of them in nature/",
)
_FOLDER = "usr/share/backgrounds/mate/nature"


def photo_sets(downloads: Path) -> dict[str, list[bytes]]:
    """The three sets, the same whenever they are made; fetches 46 MB the first time.

    Raises:
        ValueError: the package cannot be had here; it says what to bring along.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        folder = unpack(PHOTOGRAPHS, downloads) / _FOLDER
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"no photographs: {error}\nWithout a network, bring {downloads} along (of it, "
            f"{PHOTOGRAPHS.archive} is enough) from a Debian or Ubuntu machine on which "
            "`python -m benchmarks.bench_loader --parts decode` has run"
        ) from error
    photographs = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]
    rng = random.Random(0)
    small, large, shrunk = [], [], []
    for number in range(512):
        piece = _piece(photographs[number % len(photographs)], rng, 400, 640, reduce=2)
        small.append(_encoded(piece, rng, quality=88))
        piece.thumbnail((10_000, 256) if piece.width > piece.height else (256, 10_000))
        shrunk.append(_encoded(piece, rng, quality=92))
    for number in range(96):
        piece = _piece(photographs[number % len(photographs)], rng, 1000, 1600, reduce=1)
        large.append(_encoded(piece, rng, quality=85))
    return {"small": small, "large": large, "shrunk": shrunk}


def _piece(image: Image.Image, rng: random.Random, low: int, high: int, reduce: int) -> Image.Image:
    """A random piece, of an image reduced so that there is detail in every pixel."""
    width, height = image.width // reduce, image.height // reduce
    long = min(rng.randint(low, high), max(width, height))
    short = min(int(long * rng.choice((0.56, 0.667, 0.75, 0.75, 1.0))), width, height)
    sides = (long, short) if rng.random() < 0.7 else (short, long)
    sides = (min(sides[0], width), min(sides[1], height))
    left, top = rng.randint(0, width - sides[0]), rng.randint(0, height - sides[1])
    box = (left * reduce, top * reduce, (left + sides[0]) * reduce, (top + sides[1]) * reduce)
    return image.resize(sides, Image.Resampling.LANCZOS, box=box)


def _encoded(image: Image.Image, rng: random.Random, quality: int) -> bytes:
    out = io.BytesIO()
    subsampling = "4:2:0" if rng.random() < 0.85 else "4:4:4"
    image.save(
        out, "JPEG", quality=quality, subsampling=subsampling, progressive=rng.random() < 0.1
    )
    return out.getvalue()
