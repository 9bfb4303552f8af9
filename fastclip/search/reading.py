"""Images of shards as they are embedded, and what is kept of each beside its feature."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.data.decode import BadSampleError
from fastclip.data.decoders import ImageDecoder
from fastclip.data.index import Sample, ShardIndex
from fastclip.data.reader import Members
from fastclip.data.transforms import centre_crop
from fastclip.search.records import Row, image_hash

logger = logging.getLogger("fastclip")


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of one part, decoded."""

    pixels: NDArray[np.uint8]
    """[n, R, R, 3]."""

    rows: list[Row]
    """n of them."""

    bad: list[dict[str, Any]]
    """Of samples whose image cannot be used, plain data."""

    without: Counter[str]
    """Of the rows, those that lack their caption or fields, by kind of damage."""


def read_batch(
    index: ShardIndex,
    numbers: Sequence[int],
    decoder: ImageDecoder,
    side: int,
    caption_key: str,
    fields: Sequence[str],
) -> Batch:
    """Read samples; what of one cannot be used is logged with its key.

    Args:
        numbers: of the samples.
        side: R, pixels of a side.
        caption_key: as in `DataConfig`.
        fields: of the metadata, kept.

    Raises:
        OSError: a shard cannot be read.
    """
    pixels = np.empty((len(numbers), side, side, 3), np.uint8)
    rows: list[Row] = []
    bad: list[dict[str, Any]] = []
    without: Counter[str] = Counter()
    for number in numbers:
        sample = index[number]
        try:
            members = Members(sample)
            image = decoder.open(members.image)
            decoder.decode(image, centre_crop(*image.size), pixels[len(rows)])
        except BadSampleError as error:
            if error.kind == "unreadable":  # the shard is, which is no fault of the sample
                raise OSError(f"{error.reason}: the same command goes on from here") from None
            bad.append(
                {
                    "shard": str(sample.shard),
                    "offset": sample.image[0],
                    "key": sample.key,
                    "kind": error.kind,
                    "reason": error.reason,
                }
            )
            logger.warning("left out %s: %s: %s", sample.shard.name, sample.key, error)
            continue
        about, caption, damage = _texts(members, caption_key)
        for error in damage:
            without[error.kind] += 1
            logger.info("%s: %s: %s", sample.shard.name, sample.key, error)
        rows.append(_row(sample, members.image, image.size, caption, about, fields))
    return Batch(pixels[: len(rows)], rows, bad, without)


def _texts(members: Members, caption_key: str) -> tuple[dict[str, Any], str, list[BadSampleError]]:
    """Metadata and caption, empty where there is none, and why one cannot be read.

    An image is found without them, too.
    """
    about: dict[str, Any] = {}
    caption = ""
    damage: dict[str, BadSampleError] = {}  # by kind: a caption in broken metadata is no second one
    try:
        about = members.metadata()
    except BadSampleError as error:
        damage[error.kind] = error
    try:
        caption = members.captions(caption_key)[0]
    except BadSampleError as error:
        if error.kind != "missing caption":
            damage[error.kind] = error
    return about, caption, list(damage.values())


def _row(
    sample: Sample,
    content: bytes,
    size: tuple[int, int],
    caption: str,
    about: dict[str, Any],
    fields: Sequence[str],
) -> Row:
    values = {field: about.get(field) for field in fields}
    return Row(
        key=sample.key,
        caption=caption,
        place=sample.image,
        size=size,
        hash=image_hash(content),
        fields={
            field: str(value) for field, value in values.items() if isinstance(value, str | int)
        },
    )
