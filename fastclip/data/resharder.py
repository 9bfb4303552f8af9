"""What resharding does to one output shard: read its samples, shrink their images, write the tar.

A shard that is through leaves a record, written whole or not at all.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin
from safetensors import SafetensorError, safe_open

from fastclip.data.decode import (
    MAX_PIXELS,
    ORIENTATION,
    BadSampleError,
    open_image,
    orientation_of,
    to_rgb,
)
from fastclip.data.index import Sample
from fastclip.data.rewriting import end_with_parent, stopping, write_whole
from fastclip.data.shard_table import IMAGE_EXTENSIONS, index_path, load_summary
from fastclip.data.shard_writer import write_shard
from fastclip.data.storage import FILES

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How stored pixels become those that are seen, by EXIF's number."""

_FULL_CHROMA = ("PNG", "GIF", "BMP", "TIFF")
_LONGEST_SIDE = 65535
"""Of a JPEG, in pixels."""


@dataclass(frozen=True, eq=False)
class Job:
    """What resharding was asked for, and where its files lie; see `reshard`."""

    shards: list[Path]
    firsts: NDArray[np.int64]
    """[shards + 1] number of each input shard's first sample, counted over all of them."""

    planned: int
    """Samples in the plan."""

    out: Path
    short: int
    quality: int
    samples_per_shard: int
    apply_orientation: bool
    max_pixels: int

    @property
    def work(self) -> Path:
        return self.out / ".reshard"

    @property
    def plan(self) -> Path:
        """int64 [planned]: numbers of the samples, in the order in which they are written."""
        return self.work / "plan.npy"

    @property
    def count(self) -> int:
        """Output shards."""
        return -(-self.planned // self.samples_per_shard)

    def name(self, number: int) -> str:
        """Of output shard `number`; sorted as the numbers are."""
        return f"{number:0{max(5, len(str(self.count - 1)))}d}.tar"

    def record(self, number: int) -> Path:
        """What became of output shard `number`'s samples."""
        return self.work / f"{self.name(number)}.json"

    def is_written(self, number: int) -> bool:
        """Whether output shard `number` has its record, and lies in the folder."""
        if not self.record(number).is_file():
            return False
        record = json.loads(self.record(number).read_bytes())
        shard = self.out / self.name(number)
        return not record["written"] or (
            shard.is_file() and shard.stat().st_size == record["bytes"]
        )


def unique_keys(keys: Sequence[str]) -> list[str]:
    """The keys; of equal ones the second becomes ``key-2``, or the next that is free, and so on."""
    taken, times, found = set(keys), Counter[str](), []
    for key in keys:
        name = key
        while times[key] and name in taken:
            times[key] += 1
            name = f"{key}-{times[key]}"
        times[key] = times[key] or 1
        taken.add(name)
        found.append(name)
    return found


def shrunk_size(width: int, height: int, short: int) -> tuple[int, int]:
    """Width and height, in pixels, of an image whose short side becomes `short` if it is longer.

    The long side is rounded to the next pixel, halves up. 0 leaves every image as it is.
    """
    low, high = min(width, height), max(width, height)
    if not short or low <= short:
        return width, height
    long = (2 * high * short + low) // (2 * low)
    return (short, long) if width < height else (long, short)


def shrink(
    content: bytes,
    *,
    short: int,
    quality: int,
    apply_orientation: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> bytes | None:
    """An image's JPEG with a short side of `short` pixels; None where it can stay as it is.

    Bicubic with antialiasing; transparency over white, as `to_rgb` has it. Chroma is halved both
    ways (4:2:0) unless the source has all of it: a JPEG of 4:4:4, PNG, GIF, BMP or TIFF. Of EXIF
    data the orientation is kept, and nothing else of them, of profiles and comments.

    Args:
        quality: of the JPEG, 1 to 100.
        apply_orientation: turn the pixels as EXIF data say, small images as well; without it the
            tag is kept.

    Raises:
        BadSampleError: the image cannot be decoded (one that can stay is decoded, too), has more
            than `max_pixels`, or is too long for a JPEG.
    """
    image = open_image(content, max_pixels=max_pixels)
    try:
        pixels = to_rgb(image)
    except MemoryError:  # no fault of the image's: it would be left out for ever
        raise
    except Exception as error:  # decoders raise whatever their format's parser raises
        raise BadSampleError("broken image", f"{type(error).__name__}: {error}") from None
    orientation = orientation_of(image)
    turn = _TURNS.get(orientation) if apply_orientation else None
    size = shrunk_size(*pixels.size, short)
    if size == pixels.size and turn is None:
        return None
    if max(size) > _LONGEST_SIDE:
        raise BadSampleError("oversized image", f"{size[0]}×{size[1]} is too long for a JPEG")
    full_chroma = _has_full_chroma(image)
    if size != pixels.size:
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    if turn is not None:  # after the resize, where there is less to turn
        pixels = pixels.transpose(turn)
    exif = Image.Exif()
    if orientation > 1 and turn is None:
        exif[ORIENTATION] = orientation
    pixels.info.clear()  # a comment would be written again
    out = io.BytesIO()
    pixels.save(
        out,
        "JPEG",
        quality=quality,
        subsampling="4:4:4" if full_chroma else "4:2:0",
        exif=exif.tobytes() if len(exif) else b"",
    )
    return out.getvalue()


def _has_full_chroma(image: Image.Image) -> bool:
    if image.format in ("JPEG", "MPO"):
        return JpegImagePlugin.get_sampling(image) == 0
    return image.format in _FULL_CHROMA


class Resharder:
    """Does the work of a `Job`, an output shard at a time."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def write(self, number: int) -> None:
        """Write output shard `number`, if any of its samples can be used, and leave its record.

        Raises:
            ValueError: an input shard cannot be read, or has changed meanwhile.
        """
        job, name = self.job, self.job.name(number)
        first = number * job.samples_per_shard
        rows = self._plan[first : first + job.samples_per_shard]
        record: dict[str, Any] = {
            "planned": len(rows), "written": 0, "copied": 0, "shrunk": 0, "renamed": 0,
            "image_bytes_before": 0, "image_bytes_after": 0, "dropped": [],
        }  # fmt: skip
        partial = job.work / f"{name}.partial"
        try:
            digest = write_shard(partial, self._samples(rows.tolist(), record))
            record |= {"bytes": partial.stat().st_size, "sha256": digest}
            if record["written"]:
                os.replace(partial, job.out / name)
        finally:
            partial.unlink(missing_ok=True)
        content = json.dumps(record).encode()
        write_whole(job.record(number), lambda file: file.write(content))

    @cached_property
    def _plan(self) -> NDArray[np.int64]:
        return np.load(self.job.plan, mmap_mode="r")

    def _samples(
        self, rows: list[int], record: dict[str, Any]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Keys and members of the samples that can be used; `record` is filled in meanwhile."""
        job = self.job
        samples = self._look_up(rows)
        keys = unique_keys([sample.key for sample in samples])
        for row, sample, key in zip(rows, samples, keys, strict=True):
            places = (sample.image, sample.caption, sample.metadata)
            with stopping():
                image, caption, metadata = FILES.read(sample.shard, places)
            extension, smaller = sample.extension, None
            if job.short:
                try:
                    smaller = shrink(
                        image,
                        short=job.short,
                        quality=job.quality,
                        apply_orientation=job.apply_orientation,
                        max_pixels=job.max_pixels,
                    )
                except BadSampleError as error:
                    record["dropped"].append([row, error.kind, error.reason])
                    continue
            written = image if smaller is None else smaller
            members = {extension if smaller is None else "jpg": written}
            if sample.caption[0] >= 0:
                members["txt"] = bytes(caption)
            if sample.metadata[0] >= 0:
                members["json"] = bytes(metadata)
            record["written"] += 1
            record["copied" if smaller is None else "shrunk"] += 1
            record["renamed"] += key != sample.key
            record["image_bytes_before"] += len(image)
            record["image_bytes_after"] += len(written)
            yield key, members

    def _look_up(self, rows: list[int]) -> list[Sample]:
        """Where the samples of these numbers lie."""
        owners = np.searchsorted(self.job.firsts, rows, side="right") - 1
        order = np.argsort(owners, kind="stable")
        ends = np.flatnonzero(np.diff(owners[order])) + 1
        found: dict[int, Sample] = {}
        for part in np.split(order, ends):
            shard = int(owners[part[0]])
            first, last = self.job.firsts[shard : shard + 2].tolist()
            chosen = [rows[place] - first for place in part.tolist()]
            samples = _read_index(self.job.shards[shard], chosen, last - first)
            found.update(zip(part.tolist(), samples, strict=True))
        return [found[place] for place in range(len(rows))]


def _read_index(shard: Path, numbers: list[int], count: int) -> list[Sample]:
    """A few of a shard's `count` samples: without making keys of all, it is a tenth of the time.

    Raises:
        ValueError: the shard or its index is not what it was.
    """
    summary, status = load_summary(shard), shard.stat()
    is_same = summary is not None and (
        (summary.tar_bytes, summary.modified_ns) == (status.st_size, status.st_mtime_ns)
    )
    try:
        with safe_open(index_path(shard), framework="numpy") as file:
            names = ("places", "extensions", "keys", "key_ends")
            places, extensions, blob, ends = (file.get_tensor(name) for name in names)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{index_path(shard)} cannot be read: {error}") from None
    if not is_same or len(places) != count:
        raise ValueError(f"{shard} has changed after it was indexed: run this again")
    samples = []
    for number in numbers:
        begin, end = (int(ends[number - 1]) if number else 0), int(ends[number])
        key = blob[begin:end].tobytes().decode("utf-8", "surrogateescape")
        a, b, c, d, e, f = places[number].tolist()
        extension = IMAGE_EXTENSIONS[extensions[number]]
        samples.append(Sample(shard, key, (a, b), (c, d), (e, f), extension))
    return samples


_resharder: Resharder | None = None
"""A worker process's."""


def start(job: Job) -> None:
    """Begin a worker process."""
    global _resharder
    end_with_parent()
    _resharder = Resharder(job)


def work(number: int) -> None:
    """Write output shard `number` in a worker process."""
    assert _resharder is not None
    _resharder.write(number)
