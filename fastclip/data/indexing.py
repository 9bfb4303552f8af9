"""`fastclip data index`: look through shards once, and write down what is in them.

Beside each ``00000.tar`` it leaves ``00000.fcidx`` for fastclip and ``00000.idx`` for DALI.
Every image's header is read and every byte hashed, so that what is broken, too large, cut off or
there twice is known before a run begins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.data.decode import (
    MAX_PIXELS,
    BadSampleError,
    check_max_pixels,
    open_image,
    orientation_of,
)
from fastclip.data.rewriting import end_with_parent
from fastclip.data.shard_table import (
    DALI_SUFFIX,
    IMAGE_EXTENSIONS,
    Problem,
    ShardTable,
    Summary,
    beside,
    index_path,
    load_summary,
    load_table,
    partial_path,
    remove_abandoned,
    save_table,
    scan_shard,
)
from fastclip.data.shards import local_shards
from fastclip.data.storage import FILES

logger = logging.getLogger("fastclip")

CODECS = ("none", "jpeg", "png", "webp", "gif", "bmp", "tiff", "other")
"""By number in an index's column ``codecs``; none where the image cannot be read."""

FLAGS = {
    1: "broken image",
    2: "oversized image",
    4: "truncated image",
    8: "missing caption",
    16: "broken caption",
}
"""Bits of an index's column ``flags``. Such samples keep their place; a run replaces them."""

_COLUMNS: dict[str, type[np.unsignedinteger[Any]]] = {
    "widths": np.uint32,
    "heights": np.uint32,
    "codecs": np.uint8,
    "orientations": np.uint8,
    "flags": np.uint16,
    "caption_bytes": np.uint32,
    "image_hashes": np.uint64,
    "caption_hashes": np.uint64,
}
_ENDINGS = {"jpeg": b"\xff\xd9", "png": b"IEND\xaeB`\x82"}


@dataclass
class IndexReport:
    """What is in a set of shards."""

    shards: int = 0
    tar_bytes: int = 0
    lost_bytes: int = 0
    samples: int = 0
    usable: Counter[str] = field(default_factory=Counter)
    """Samples by what they have beside the image: "txt", "json", "json+txt", "" for any."""

    problems: list[Problem] = field(default_factory=list)
    """Of tars and of samples."""

    codecs: Counter[str] = field(default_factory=Counter)
    turned: int = 0
    """Images whose EXIF data ask to be turned."""

    short_sides: tuple[int, int, int] | None = None
    """Of the readable images, in pixels: least, median, most."""

    caption_bytes: float = 0.0
    """Mean of the captions there are."""

    repeated_images: int = 0
    """Images of which an earlier one has the same bytes."""

    repeated_pairs: int = 0
    """Of these, those whose caption is the same as well."""

    def as_json(self) -> dict[str, Any]:
        """Plain data; problems by name."""
        return {
            **asdict(self),
            "problems": [asdict(problem) for problem in self.problems],
            "usable": dict(self.usable),
            "codecs": dict(self.codecs),
        }


def build_index(
    pattern: str,
    *,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    anew: bool = False,
) -> IndexReport:
    """Index the shards meant by `pattern`; those whose index is of this very file are left alone.

    Args:
        max_pixels: larger images are reported as oversized.
        workers: processes; None: one for each processor. 0 works in this one.
        anew: index all again.

    Raises:
        FileNotFoundError, ValueError: see `local_shards`; or a shard changes meanwhile.
        OSError: a shard cannot be read, or its folder not be written to.
    """
    check_max_pixels(max_pixels)
    if workers is not None and workers < 0:
        raise ValueError(f"workers is at least 0, not {workers}")
    shards = local_shards(pattern)
    FILES.forget(shards)
    todo = [shard for shard in shards if anew or not _is_current(shard)]
    for folder in {shard.parent for shard in shards}:
        remove_abandoned(folder)
    logger.info("%d shard(s), %d to be looked through", len(shards), len(todo))
    with _pool(workers, len(todo)) as pool:
        for number, _ in enumerate(pool.map(_index_shard, todo), 1):
            if number % max(len(todo) // 20, 1) == 0:
                logger.info("%d of %d", number, len(todo))
    return summarise_index(shards, max_pixels)


def _pool(workers: int | None, shards: int) -> Executor:
    wanted = min(os.cpu_count() or 1 if workers is None else workers, shards)
    if wanted <= 1:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(wanted, context, initializer=end_with_parent)


def _is_current(shard: Path) -> bool:
    status = shard.stat()
    try:
        summary = load_summary(shard)
    except ValueError as error:
        logger.warning("%s", error)
        return False
    return (
        summary is not None
        and summary.tar_bytes == status.st_size
        and summary.modified_ns == status.st_mtime_ns
        and _dali_path(shard).is_file()
    )


def _index_shard(shard: Path) -> None:
    before = shard.stat()
    summary, table = scan_shard(shard)
    table.columns.update(_look_through(shard, table))
    after = shard.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{shard} has changed while it was indexed: run this again")
    _write_dali_index(shard, table)
    save_table(shard, summary, table)


def _look_through(shard: Path, table: ShardTable) -> dict[str, NDArray[Any]]:
    """The columns that only the samples' bytes can tell."""
    rows = []
    for a, b, c, d, _, _ in table.places.tolist():
        try:
            image, caption, _ = FILES.read(shard, ((a, b), (c, d), (-1, 0)))
        except BadSampleError as error:
            raise ValueError(f"{error}: run this again") from None
        width, height, codec, orientation, flags = _look(image)
        if c >= 0:
            flags |= _caption_flags(caption)
        rows.append(
            (width, height, codec, orientation, flags, len(caption), _hash(image), _hash(caption))
        )
    columns = zip(*rows, strict=True) if rows else ([] for _ in _COLUMNS)
    return {
        name: np.array(column, dtype=kind)
        for (name, kind), column in zip(_COLUMNS.items(), columns, strict=True)
    }


def _look(image: bytes) -> tuple[int, int, int, int, int]:
    """Width, height, codec, orientation, flags; from the header alone."""
    try:
        picture = open_image(image)
    except BadSampleError as error:
        return 0, 0, 0, 1, 2 if error.kind == "oversized image" else 1
    kind = (picture.format or "").lower()
    kind = "jpeg" if kind == "mpo" else kind
    codec = CODECS.index(kind) if kind in CODECS else CODECS.index("other")
    orientation = orientation_of(picture)
    flags = 0
    # Some cameras write zeros, or their own data, behind the end.
    ending = _ENDINGS.get(kind)
    if ending is not None and ending not in image[-65536:]:
        flags |= 4
    return picture.width, picture.height, codec, orientation, flags


def _caption_flags(caption: bytes) -> int:
    try:
        return 0 if caption.decode("utf-8").strip() else 8
    except UnicodeDecodeError:
        return 16


def _hash(content: bytes) -> int:
    """64 bits; equal ones among a billion images are the same image, but for one chance in 40."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def _dali_path(shard: Path) -> Path:
    return beside(shard, DALI_SUFFIX)


def _write_dali_index(shard: Path, table: ShardTable) -> None:
    """What DALI's wds2idx would write, of the samples that have an image."""
    target = _dali_path(shard)
    partial = partial_path(target)
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"v1.2 {len(table.keys)}\n")
            rows = zip(table.keys, table.places.tolist(), table.extensions, strict=True)
            for key, places, number in rows:
                name = "_".join(key.split())  # blanks part the columns
                extensions = (IMAGE_EXTENSIONS[number], "txt", "json")
                members = zip(extensions, places[::2], places[1::2], strict=True)
                there = [m for m in members if m[1] >= 0]
                file.write(" ".join(f"{e} {at} {size} {name}.{e}" for e, at, size in there) + "\n")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def summarise_index(shards: list[Path], max_pixels: int = MAX_PIXELS) -> IndexReport:
    """Totals over indexed shards; images of more than `max_pixels` are among the problems.

    Raises:
        ValueError: a shard has no index, or a damaged one.
    """
    report = IndexReport()
    sides, images, captions, lengths = [], [], [], []
    for shard, summary, table in _tables(shards):
        columns = table.columns
        report.shards += 1
        report.tar_bytes += summary.tar_bytes
        report.lost_bytes += summary.lost_bytes
        report.samples += summary.samples
        report.usable.update(summary.usable)
        report.problems += [*summary.problems, *_flagged(shard, table, max_pixels)]
        names = np.array(CODECS)[columns["codecs"]]
        report.codecs.update(names.tolist())
        report.turned += int((columns["orientations"] > 1).sum())
        readable = columns["codecs"] > 0
        sides.append(np.minimum(columns["widths"], columns["heights"])[readable])
        images.append(columns["image_hashes"])
        captions.append(columns["caption_hashes"])
        lengths.append(columns["caption_bytes"][table.places[:, 2] >= 0])
    side = np.sort(np.concatenate(sides)) if sides else np.empty(0)
    if len(side):
        report.short_sides = int(side[0]), int(side[len(side) // 2]), int(side[-1])
    length = np.concatenate(lengths) if lengths else np.empty(0)
    report.caption_bytes = float(length.mean()) if len(length) else 0.0
    if images:
        every = np.stack([np.concatenate(images), np.concatenate(captions)], axis=1)
        report.repeated_images = len(every) - len(np.unique(every[:, 0]))
        report.repeated_pairs = len(every) - len(np.unique(every, axis=0))
    return report


def _tables(shards: list[Path]) -> Iterator[tuple[Path, Summary, ShardTable]]:
    for shard in shards:
        summary = load_summary(shard)
        if summary is None:
            raise ValueError(f"{shard} has no index: {index_path(shard)} is not there")
        table = load_table(shard)
        if missing := _COLUMNS.keys() - table.columns.keys():
            raise ValueError(f"{index_path(shard)} has no {min(missing)}: make it anew with --anew")
        yield shard, summary, table


def _flagged(shard: Path, table: ShardTable, max_pixels: int) -> list[Problem]:
    columns = table.columns
    oversized = columns["widths"].astype(np.uint64) * columns["heights"] > max_pixels
    flags, problems = columns["flags"] | np.where(oversized, 2, 0).astype(np.uint16), []
    for number in np.flatnonzero(flags):
        for bit, kind in FLAGS.items():
            if flags[number] & bit:
                problems.append(Problem(shard.name, table.keys[number], kind, "seen when indexed"))
    return problems


def write_report(report: IndexReport, path: Path) -> None:
    """The report as JSON."""
    path.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")


def format_report(report: IndexReport, most: int = 20) -> str:
    """The report for a reader: totals, and the first `most` problems of each kind."""
    usable = report.usable
    lines = [
        f"{report.shards:,} shards, {report.tar_bytes / 1e9:.2f} GB, {report.samples:,} images",
        f"  with a caption (txt) {usable['txt']:,}, metadata (json) {usable['json']:,}, "
        f"both {usable['json+txt']:,}",
        f"  formats: {', '.join(f'{n:,} {kind}' for kind, n in report.codecs.most_common())}",
    ]
    if report.short_sides is not None:
        low, middle, high = report.short_sides
        lines.append(f"  short side: {low} to {high} px, median {middle}")
    lines.append(f"  captions: {report.caption_bytes:.0f} bytes in the mean")
    lines.append(f"  to be turned by EXIF: {report.turned:,}")
    lines.append(
        f"  repeated images: {report.repeated_images:,}, with the same caption "
        f"{report.repeated_pairs:,}"
    )
    if report.lost_bytes:
        lines.append(f"  bytes lost to damaged headers or cut shards: {report.lost_bytes:,}")
    counts = Counter(problem.kind for problem in report.problems)
    for kind, count in counts.most_common():
        lines.append(f"  {kind}: {count:,}")
        named = [problem for problem in report.problems if problem.kind == kind]
        lines += [f"    {problem}" for problem in named[:most]]
        if count > most:
            lines.append(f"    … and {count - most:,} more")
    return "\n".join(lines)
