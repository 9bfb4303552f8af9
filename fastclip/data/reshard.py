"""`fastclip data reshard`: shards written anew, so that training reads and decodes less.

Images are made as small as training needs them, repetitions and what cannot be used are left out,
samples are grouped anew, shuffled on request. Captions stay text: the native tokenizer costs next
to nothing beside an image, and tokens would tie the shards to one vocabulary and context length.

What an output shard holds is planned beforehand, from the inputs' indexes and the arguments alone.
A sample that turns out to be broken makes its shard smaller and shifts nothing. A finished shard
leaves a record in `.reshard` in the output folder, so that a run that was killed goes on at the
next one, and ends with the same bytes whatever the number of processes.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
from numpy.typing import NDArray

from fastclip.data.decode import MAX_PIXELS
from fastclip.data.indexing import build_index
from fastclip.data.reshard_plan import REASONS, Dedup, make_plan
from fastclip.data.resharder import Job, Resharder, start, work
from fastclip.data.rewriting import alone, begin, write_whole
from fastclip.data.shard_table import load_table
from fastclip.data.shards import local_shards

logger = logging.getLogger("fastclip")

_VERSION = 1
_SECONDS_BETWEEN_LINES = 30
_LATE = 255
"""For what turned out to be unusable when it was decoded."""


@dataclass(frozen=True)
class ReshardSummary:
    """What became of the samples."""

    shards: int
    """Given."""

    samples: int
    """Images in the given shards."""

    written: int
    shards_written: int
    dropped: dict[str, int]
    """Samples left out by kind, each named in `dropped.jsonl`; with `written` they make
    `samples`."""

    copied: int
    """Of the written ones, images whose bytes are unchanged."""

    shrunk: int
    """Those encoded anew."""

    renamed: int
    """Those whose key was that of an earlier sample of their output shard."""

    image_bytes_before: int
    """Of the written ones, as given."""

    image_bytes_after: int


def reshard(
    pattern: str,
    out: Path,
    *,
    short: int = 256,
    quality: int = 90,
    dedup: Dedup = "none",
    needs: Sequence[str] = ("txt",),
    samples_per_shard: int = 10_000,
    shuffle: int | None = None,
    apply_orientation: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
) -> ReshardSummary:
    """Write some shards anew, or go on writing them.

    The inputs are indexed first where they are not (see `build_index`), and so are the outputs at
    the end. Beside the shards come `dropped.jsonl` (shard, offset of the image in bytes, key, kind
    and reason of each sample left out) and `reshard.json`, the summary with the arguments. Keys are
    kept; where equal ones meet in an output shard, the second becomes ``key-2``, and so on. Members
    but images, txt and json are not copied.

    Args:
        pattern: the shards, local ones; see `expand_shards`.
        out: an empty folder, or one that was begun with the same arguments; it is made.
        short: pixels. Images with a longer short side are resized and become JPEGs (see `shrink`);
            the bytes of others are copied. 0 copies all, and decodes none: only what the index
            knows to be broken is left out.
        quality: of these JPEGs, 1 to 100.
        dedup: of "images" with the same bytes, or "pairs" of image and caption, keep the first:
            64 bits of SHA-256 and the sizes are compared, in 26 bytes of memory a sample.
        needs: what a sample must have beside its image, "txt" (text, in UTF-8) or "json".
        samples_per_shard: planned for each output shard; the last one has the rest.
        shuffle: seed of a permutation of all samples, from 0 to 2**64 - 1; None keeps their order.
        apply_orientation: turn pixels as EXIF data say. Without it the tag is kept, so that
            ``data.apply_orientation`` works as before.
        max_pixels: larger images are left out.
        workers: processes. Several are started anew, so a script that asks for them needs the usual
            ``if __name__ == "__main__"``.

    Raises:
        ValueError: an argument is not as said; the folder was begun with other arguments or shards,
            or is not empty (what differs is named); another process is at work on it; no sample can
            be used; a shard has changed meanwhile, or cannot be read.
        FileNotFoundError: there are no such shards.
        OSError: files cannot be written, the inputs' indexes among them.
        ChildProcessError: a worker died. The same call goes on.
        RuntimeError: the totals do not add up.
    """
    settings: dict[str, Any] = {
        "version": _VERSION,
        "short": short,
        "quality": quality,
        "dedup": dedup,
        "needs": sorted(set(needs)),
        "samples_per_shard": samples_per_shard,
        "shuffle": shuffle,
        "apply_orientation": apply_orientation,
        "max_pixels": max_pixels,
    }
    _check(out, workers, settings)
    shards = local_shards(pattern)
    if any(shard.resolve().parent == out.resolve() for shard in shards):
        raise ValueError(f"{out} holds the shards to rewrite: name another output folder")
    build_index(pattern, max_pixels=max_pixels, workers=workers)
    plan = make_plan(shards, dedup, needs, shuffle, max_pixels)
    job = Job(
        shards=shards,
        firsts=plan.firsts,
        planned=len(plan.rows),
        out=out,
        short=short,
        quality=quality,
        samples_per_shard=samples_per_shard,
        apply_orientation=apply_orientation,
        max_pixels=max_pixels,
    )
    if not job.planned:
        raise ValueError(f"{pattern}: none of {len(plan.reasons)} samples can be used")
    begin(job.work, out, settings, plan.inputs)
    with alone(job.work, out, "resharding"):
        write_whole(job.plan, lambda file: np.save(file, plan.rows))
        _write_all(job, [n for n in range(job.count) if not job.is_written(n)], workers)
        summary = _add_up(job, plan.reasons)
        if summary.written:
            found = build_index(str(out), max_pixels=max_pixels, workers=workers).samples
            if found != summary.written:
                raise RuntimeError(f"{out} has {found} samples; {summary.written} were written")
        content = json.dumps({**asdict(summary), "arguments": settings}, indent=1).encode()
        write_whole(out / "reshard.json", lambda file: file.write(content))
    return summary


def _check(out: Path, workers: int, settings: dict[str, Any]) -> None:
    short, quality, seed = settings["short"], settings["quality"], settings["shuffle"]
    if short < 0:
        raise ValueError(f"short is a number of pixels, or 0 to copy images, not {short}")
    if not short and settings["apply_orientation"]:
        raise ValueError("short=0 copies images as they are: apply_orientation needs a short side")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is between 1 and 100, not {quality}")
    if settings["dedup"] not in get_args(Dedup):
        raise ValueError(f"dedup is {', '.join(get_args(Dedup))}, not {settings['dedup']!r}")
    if other := set(settings["needs"]) - {"txt", "json"}:
        raise ValueError(f"needs names txt and json, not {', '.join(sorted(other))}")
    for name in ("samples_per_shard", "max_pixels"):
        if settings[name] < 1:
            raise ValueError(f"{name} is at least 1, not {settings[name]}")
    if seed is not None and not 0 <= seed < 1 << 64:
        raise ValueError(f"shuffle is a seed between 0 and 2**64 - 1, not {seed}")
    if workers < 1:
        raise ValueError(f"workers is a positive number of processes, not {workers}")
    if re.search(r"::|://|^pipe:|\{\d+\.\.\d+\}", str(out)):
        raise ValueError(f"{out} would be read as a list of shards: name another output folder")


def _write_all(job: Job, numbers: list[int], workers: int) -> None:
    """Write these output shards, and log from time to time how many are done."""
    said = time.monotonic()
    with ExitStack() as stack:
        if min(workers, len(numbers)) > 1:
            # A fork of a process with threads, such as torch's, may never wake up.
            pool = stack.enter_context(
                ProcessPoolExecutor(min(workers, len(numbers)), get_context("spawn"), start, (job,))
            )
            done = pool.map(work, numbers)
        else:
            done = map(Resharder(job).write, numbers)
        try:
            for count, _ in enumerate(done, 1):
                if time.monotonic() - said > _SECONDS_BETWEEN_LINES or count == len(numbers):
                    said = time.monotonic()
                    logger.info("%d of %d shard(s) written", count, len(numbers))
        except BrokenProcessPool:
            raise ChildProcessError(
                f"one of {workers} worker processes died, perhaps for lack of memory: the same "
                "call goes on, with fewer workers if need be"
            ) from None


def _add_up(job: Job, reasons: NDArray[np.uint8]) -> ReshardSummary:
    """Name what was left out, and see that nothing else is missing."""
    totals: Counter[str] = Counter()
    late: dict[int, tuple[str, str]] = {}
    for number in range(job.count):
        record = json.loads(job.record(number).read_bytes())
        for row, kind, reason in record.pop("dropped"):
            late[row] = kind, reason
        totals["shards_written"] += record["written"] > 0
        totals.update({name: n for name, n in record.items() if name != "sha256"})
    reasons[list(late)] = _LATE
    dropped: Counter[str] = Counter()
    write_whole(
        job.out / "dropped.jsonl", lambda file: _write_dropped(file, job, reasons, late, dropped)
    )
    samples, left_out = len(reasons), sum(dropped.values())
    if totals["planned"] != job.planned or samples != totals["written"] + left_out:
        raise RuntimeError(
            f"{samples} samples were given, {totals['written']} written and {left_out} left out: "
            f"some are lost. Delete {job.out} and begin anew"
        )
    if dropped:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(dropped.items()))
        logger.warning("left out %s: named in %s", listed, job.out / "dropped.jsonl")
    names = ("written", "shards_written", "copied", "shrunk", "renamed")
    return ReshardSummary(
        shards=len(job.shards),
        samples=samples,
        dropped=dict(sorted(dropped.items())),
        image_bytes_before=totals["image_bytes_before"],
        image_bytes_after=totals["image_bytes_after"],
        **{name: totals[name] for name in names},
    )


def _write_dropped(
    file: IO[bytes],
    job: Job,
    reasons: NDArray[np.uint8],
    late: dict[int, tuple[str, str]],
    dropped: Counter[str],
) -> None:
    """A line for each sample left out, in the inputs' order; counted by kind in `dropped`."""
    for number, shard in enumerate(job.shards):
        first, last = job.firsts[number : number + 2].tolist()
        left_out = np.flatnonzero(reasons[first:last]).tolist()
        table = load_table(shard) if left_out else None
        for place in left_out:
            assert table is not None
            row = first + place
            kind, reason = late[row] if row in late else REASONS[int(reasons[row])]
            entry = {
                "shard": str(shard),
                "offset": int(table.places[place, 0]),
                "key": table.keys[place],
                "kind": kind,
                "reason": reason,
            }
            dropped[kind] += 1
            file.write(json.dumps(entry).encode() + b"\n")
