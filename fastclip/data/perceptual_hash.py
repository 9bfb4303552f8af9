"""A perceptual hash of images, and an exact search for the hashes that are near each other.

The hash is one of the DCT family (pHash, PDQ): signs of low frequencies, of brightness and colour.
The search is multi-index hashing (Norouzi, Punjani and Fleet, arXiv 1307.2982): of two hashes that
differ in few bits, some part is the same, or nearly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fastclip.data.index import ShardIndex
from fastclip.data.pixels import PixelReader, whole

HASH_VERSION = 1
"""Changes with the bits that an image gets."""

HASH_SIDE = 32
"""Pixels of each side of the image that is hashed."""

HASH_BITS = 128
LARGEST_RADIUS = 31
"""Beyond it, a search tries more than three bits in each part: comparing all would be quicker."""

_LUMA_BITS, _CHROMA_BITS = 96, 16
_DEAD_ZONE = 3.0
"""A coefficient's bit is set above it. In pixels' units, as the DCT is orthonormal: what JPEG adds
to a coefficient that is zero, as half of a symmetric drawing's are, does not reach it."""

_PARTS = HASH_BITS // 16
_QUERIES_AT_A_TIME = 1 << 20
_PAIRS_AT_A_TIME = 1 << 18

Hashes = NDArray[np.uint64]
"""[images, 2]."""

_YCBCR = np.array(
    [[0.299, -0.168736, 0.5], [0.587, -0.331264, -0.418688], [0.114, 0.5, -0.081312]], np.float32
)
"""RGB times this is JPEG's brightness and colour differences."""


def _dct_rows(count: int) -> NDArray[np.float32]:
    """The first rows of the orthonormal DCT-II of `HASH_SIDE` values."""
    place = np.arange(HASH_SIDE)
    rows = np.cos(np.pi * (2 * place + 1) * np.arange(count)[:, None] / (2 * HASH_SIDE))
    rows[0] /= np.sqrt(2)
    return (rows * np.sqrt(2 / HASH_SIDE)).astype(np.float32)


_ROWS = _dct_rows(HASH_SIDE // 2)
_FREQUENCIES = np.array(
    sorted(itertools.product(range(len(_ROWS)), repeat=2), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
)
"""(vertical, horizontal), the lowest first."""


def perceptual_hash(pixels: NDArray[np.uint8]) -> Hashes:
    """128 bits for each image: 96 of its brightness, 16 of each colour difference.

    A bit says whether one of the lowest frequencies of a two-dimensional DCT exceeds a little more
    than zero; the brightness's mean is left out. Encoding an image again, resizing or stretching
    it, and moderate brightness and contrast change a few bits; cropping 5 % some 15; turning or
    mirroring it about half, unless it is symmetric.

    Args:
        pixels: RGB [images, 32, 32, 3], the whole of each image.
    """
    colours = pixels.astype(np.float32) @ _YCBCR
    bits = np.empty((len(pixels), HASH_BITS), np.bool_)
    end = 0
    for channel, count, first in ((0, _LUMA_BITS, 1), (1, _CHROMA_BITS, 0), (2, _CHROMA_BITS, 0)):
        chosen = _FREQUENCIES[first : first + count]
        down, across = _ROWS[: chosen[:, 0].max() + 1], _ROWS[: chosen[:, 1].max() + 1]
        coefficients = down @ colours[..., channel] @ across.T
        bits[:, end : end + count] = coefficients[:, chosen[:, 0], chosen[:, 1]] > _DEAD_ZONE
        end += count
    return np.packbits(bits, axis=1).view(np.uint64)


def hash_samples(
    reader: PixelReader, index: ShardIndex, numbers: range
) -> tuple[Hashes, NDArray[np.bool_]]:
    """Hashes of samples, and which of them have one; the others' are 0."""
    hashes = np.zeros((len(numbers), 2), np.uint64)
    usable = np.zeros(len(numbers), np.bool_)
    for first in range(0, len(numbers), 4096):
        part = slice(first, first + 4096)
        pixels, usable[part] = reader.read(index, numbers[part], HASH_SIDE, whole, quick=True)
        hashes[part] = perceptual_hash(pixels)
    hashes[~usable] = 0
    return hashes, usable


def hamming(a: Hashes, b: Hashes) -> NDArray[np.int64]:
    """Bits in which hashes differ; over the last axis of both, which broadcast."""
    return np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.int64)


class HammingIndex:
    """Hashes, made ready to be asked which of them lie within a radius of others. Exact.

    The hash's 128 bits are 8 parts of 16. If of two hashes part i differs in more than r[i] bits,
    for every i, they differ in at least sum(r) + 8: with sum(r) = radius - 7, any two within the
    radius have a part with at most r[i] bits of difference. The stored hashes are sorted by each
    part, and all of a part's values within r[i] bits of a query's are looked up.

    Memory: 16 bytes a hash and 4 for each of its parts, 48 in all, and 2 MiB.

    Args:
        hashes: uint64 [N, 2], stored.
        radius: in bits, at most `LARGEST_RADIUS`.
    """

    def __init__(self, hashes: Hashes, radius: int) -> None:
        if not 0 <= radius <= LARGEST_RADIUS:
            raise ValueError(f"a radius is from 0 to {LARGEST_RADIUS} bits, not {radius}")
        self.radius = radius
        self._low, self._high = np.ascontiguousarray(hashes.T)
        self._parts = [
            (part, _masks(reach), *_buckets(hashes, part))
            for part, reach in enumerate(_reaches(radius))
            if reach >= 0
        ]

    def near(
        self, queries: Hashes
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Every pair within the radius, once, sorted by query and stored hash.

        A hundred thousand queries or more at a time take the least time for each.

        Returns:
            Rows of `queries`, rows of the stored hashes, and the bits in which they differ.
        """
        found = [np.zeros((3, 0), np.int64)]
        for first in range(0, len(queries), _QUERIES_AT_A_TIME):
            for pairs in self._near(queries[first : first + _QUERIES_AT_A_TIME]):
                pairs[0] += first
                found.append(pairs)
        pairs = np.unique(np.concatenate(found, axis=1), axis=1)
        return pairs[0], pairs[1], pairs[2]

    def _near(self, queries: Hashes) -> Iterator[NDArray[np.int64]]:
        low, high = np.ascontiguousarray(queries.T)
        for part, masks, starts, order in self._parts:
            query_starts, query_order = _buckets(queries, part)
            counts = np.diff(starts)
            query_counts = np.diff(query_starts)
            present = np.flatnonzero(query_counts)
            for mask in masks:
                other = present ^ mask
                some = np.flatnonzero(counts[other])
                bucket, other = present[some], other[some]
                # Values with both queries and stored hashes: their queries, then all pairs.
                where = _ranges(query_starts[bucket], query_counts[bucket])
                begin = np.repeat(starts[other], query_counts[bucket])
                count = np.repeat(counts[other], query_counts[bucket])
                for part_of in _split(count):
                    rows = np.repeat(query_order[where[part_of]], count[part_of])
                    stored = order[_ranges(begin[part_of], count[part_of])]
                    distance = np.bitwise_count(low[rows] ^ self._low[stored])
                    kept = np.flatnonzero(distance <= self.radius)  # half of it rejects nearly all
                    rows, stored = rows[kept], stored[kept]
                    total = distance[kept] + np.bitwise_count(high[rows] ^ self._high[stored])
                    close = np.flatnonzero(total <= self.radius)
                    if len(close):
                        found = rows[close], stored[close], total[close]
                        yield np.stack([column.astype(np.int64) for column in found])


def _reaches(radius: int) -> list[int]:
    """Bits of difference up to which each part is looked up; -1 for not at all."""
    total = radius - (_PARTS - 1)
    if total <= 0:
        return [0] * (radius + 1) + [-1] * (_PARTS - 1 - radius)
    low, more = divmod(total, _PARTS)
    return [low + (part < more) for part in range(_PARTS)]


def _masks(reach: int) -> list[int]:
    """All numbers of 16 bits of which at most `reach` are set."""
    values = np.arange(1 << 16, dtype=np.uint16)
    return values[np.bitwise_count(values) <= reach].tolist()


def _buckets(hashes: Hashes, part: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Hashes grouped by a part's value: where each value's begin [65537], and their rows."""
    values = np.ascontiguousarray(hashes).view(np.uint16)[:, part]
    starts = np.zeros((1 << 16) + 1, np.int32)
    starts[1:] = np.cumsum(np.bincount(values, minlength=1 << 16))
    return starts, np.argsort(values, kind="stable").astype(np.int32)


def _ranges(begin: NDArray[np.int32], count: NDArray[np.int32]) -> NDArray[np.int32]:
    """begin[0], begin[0] + 1, ... count[0] of them, then those of begin[1], and so on."""
    ends = np.cumsum(count, dtype=np.int32)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(begin - (ends - count), count) + np.arange(total, dtype=np.int32)


def _split(count: NDArray[np.int32]) -> Iterator[slice]:
    """Parts of `count` whose sums are about `_PAIRS_AT_A_TIME`, so that memory is bounded."""
    ends = np.cumsum(count, dtype=np.int64)
    first = 0
    while first < len(count):
        done = int(ends[first]) - int(count[first])
        last = max(int(np.searchsorted(ends, done + _PAIRS_AT_A_TIME, "right")), first + 1)
        yield slice(first, last)
        first = last
