"""Random pairs as real shards, for benchmarks of everything but learning."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from fastclip.data.shard_writer import write_shard

logger = logging.getLogger("fastclip")

PAIRS_PER_SHARD = 1000
_WORDS = (
    "a photo of the small old red green blue bright dark house river mountain dog cat bird street "
    "boat market window garden child woman man with and under near behind on table stone wooden "
    "winter evening light sky field train bridge flower paper glass door hill road sea"
)


def build_synthetic(directory: Path, pairs: int, *, image_size: int = 256, seed: int = 0) -> None:
    """Write ``directory/00000.tar`` …: JPEGs of coloured noise and captions of 3 to 20 words.

    Each pair depends on (seed, its number) alone. The noise is smooth, so that a JPEG has about
    the size of a photograph's.

    Raises:
        ValueError: a number that is not positive.
        FileExistsError: the folder holds shards already.
    """
    if pairs < 1 or image_size < 8:
        raise ValueError(f"pairs={pairs} and image_size={image_size} must be at least 1 and 8")
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.glob("*.tar")):
        raise FileExistsError(f"{directory} holds shards already; choose an empty folder")
    for shard, first in enumerate(range(0, pairs, PAIRS_PER_SHARD)):
        numbers = range(first, min(first + PAIRS_PER_SHARD, pairs))
        partial = directory / f".{shard:05d}.partial"
        write_shard(partial, (_pair(number, image_size, seed) for number in numbers))
        partial.replace(directory / f"{shard:05d}.tar")
    logger.info("%d pairs in %s", pairs, directory)


def _pair(number: int, image_size: int, seed: int) -> tuple[str, dict[str, bytes]]:
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(digest, "little"))
    coarse = random.integers(0, 256, (image_size // 8, image_size // 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((image_size, image_size), Image.Resampling.BICUBIC)
    grain = random.normal(0, 6, (image_size, image_size, 3))
    pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=85)
    caption = " ".join(random.choice(_WORDS.split(), random.integers(3, 21)))
    about = {"label": caption, "label_id": number}
    members = {
        "jpg": encoded.getvalue(),
        "txt": caption.encode(),
        "json": json.dumps(about).encode(),
    }
    return f"{number:09d}", members
