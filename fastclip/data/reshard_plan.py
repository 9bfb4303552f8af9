"""What resharding writes where: the samples of each output shard, and why others are left out.

A pure function of the inputs' indexes and the arguments.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastclip.data.plan import permutation
from fastclip.data.rewriting import is_unsafe
from fastclip.data.shard_table import ShardTable, load_summary, load_table

logger = logging.getLogger("fastclip")

Dedup = Literal["none", "images", "pairs"]

REASONS = {
    1: ("unsafe name", "it leads out of the folder it is unpacked in"),
    2: ("missing caption", "it has no txt member"),
    3: ("missing metadata", "it has no json member"),
    4: ("missing caption", "empty text"),
    5: ("broken caption", "not UTF-8"),
    6: ("broken image", "its header could not be read when it was indexed"),
    7: ("oversized image", "more than max_pixels"),
    8: ("repeated image", "an earlier image has the same bytes"),
    9: ("repeated pair", "an earlier image and caption have the same bytes"),
}
"""Kind and reason of what the plan leaves out, by number; 0 is for what is planned."""


@dataclass(frozen=True, eq=False)
class ReshardPlan:
    """What is written, in which order; samples are numbered over all shards."""

    firsts: NDArray[np.int64]
    """[shards + 1] number of each input shard's first sample."""

    reasons: NDArray[np.uint8]
    """[samples] key of `REASONS`, or 0 for what is planned."""

    rows: NDArray[np.int64]
    """[planned] numbers of samples in the order in which they are written."""

    inputs: list[str]
    """Each shard's name and content, for comparison."""


def make_plan(
    shards: Sequence[Path], dedup: Dedup, needs: Sequence[str], seed: int | None, max_pixels: int
) -> ReshardPlan:
    """Look through the indexes of `shards`. What is wrong with the tars themselves is logged.

    Args:
        dedup, needs, max_pixels: see `reshard`.
        seed: of a permutation of all samples; None for none.

    Raises:
        ValueError: a shard has no index, or a damaged one.
    """
    counts = []
    for shard in shards:
        summary = load_summary(shard)
        if summary is None:
            raise ValueError(f"{shard} has no index: run fastclip data index")
        counts.append(summary.samples)
        for problem in summary.problems:
            logger.warning("%s", problem)
    firsts = np.cumsum([0, *counts], dtype=np.int64)
    reasons = np.zeros(firsts[-1], np.uint8)
    hashes = np.empty(0 if dedup == "none" else len(reasons), np.uint64)
    sizes = np.empty(len(hashes), np.uint32)
    inputs, filled = [], 0
    for number, shard in enumerate(shards):
        table = load_table(shard)
        part = reasons[firsts[number] : firsts[number + 1]]
        part[:] = _unusable(table, needs, max_pixels)
        inputs.append(f"{shard.name} of {len(part)} samples with hash {_content(table)}")
        if dedup != "none":
            more = filled + int((part == 0).sum())
            found = _identities(table, dedup)
            hashes[filled:more], sizes[filled:more] = (column[part == 0] for column in found)
            filled = more
    again = repetitions(hashes[:filled], sizes[:filled])
    del hashes, sizes
    rows = np.flatnonzero(reasons == 0)
    if len(again):
        reasons[rows[again]] = 8 if dedup == "images" else 9
        rows = rows[~again]
    if seed is not None:
        rows = rows[permutation(len(rows), seed)]
    return ReshardPlan(firsts, reasons, rows, inputs)


def _unusable(table: ShardTable, needs: Sequence[str], max_pixels: int) -> NDArray[np.uint8]:
    """Keys of `REASONS`, [samples]: the first that holds, 0 where none does."""
    columns, flags = table.columns, table.columns["flags"]
    pixels = columns["widths"].astype(np.int64) * columns["heights"]
    has_caption, wants_text = table.places[:, 2] >= 0, "txt" in needs
    conditions = {
        1: np.array([is_unsafe(key) for key in table.keys], bool),
        2: ~has_caption & wants_text,
        3: (table.places[:, 4] < 0) & ("json" in needs),
        4: ((flags & 8) > 0) & wants_text,
        5: ((flags & 16) > 0) & wants_text,
        6: (flags & 1) > 0,
        # Pillow says of some no more than that they are too large. What is larger than was allowed
        # when it was indexed need not be larger than is allowed now.
        7: (pixels > max_pixels) | (((flags & 2) > 0) & (pixels == 0)),
    }
    found = np.zeros(len(table.keys), np.uint8)
    for reason, condition in conditions.items():
        found[condition & (found == 0)] = reason
    return found


def _content(table: ShardTable) -> str:
    """A hash of keys, members' places, images' and captions' bytes; 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update("\0".join(table.keys).encode("utf-8", "surrogateescape"))
    for column in (table.places, table.columns["image_hashes"], table.columns["caption_hashes"]):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _identities(table: ShardTable, dedup: Dedup) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Hash and size of what is compared, [samples] each; a pair's are its members' in one."""
    hashes = table.columns["image_hashes"].copy()
    sizes = table.places[:, 1].astype(np.uint32)
    if dedup == "pairs":  # multiplied by odd numbers, which loses nothing of either
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += table.columns["caption_hashes"]
        sizes *= np.uint32(0x9E3779B1)
        sizes += table.places[:, 3].astype(np.uint32)
    return hashes, sizes


def repetitions(hashes: NDArray[np.uint64], sizes: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which have the hash and size of an earlier one, [samples]."""
    order = np.lexsort((sizes, hashes))  # stable: the first one stays the first
    again = np.zeros(len(hashes), bool)
    block = 1 << 20
    for begin in range(1, len(order), block):
        before, here = order[begin - 1 : begin + block - 1], order[begin : begin + block]
        before = before[: len(here)]
        again[here] = (hashes[here] == hashes[before]) & (sizes[here] == sizes[before])
    return again
