"""What a variant has to compute and to move: the floor that a measured time is held against.

Symbols: b rows of this rank, N columns, D dims, e bytes of a feature, u = 2·b·N·D FLOP, k chunks of
rows. Every formula stands here; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.cases import Case

CHUNK_ELEMENTS = 1 << 28
"""Entries of G that the kernels hold at a time."""

TILE = 128
"""Rows and columns of a tile of S on sm_90."""


class Work(NamedTuple):
    """One call."""

    units: float
    """Products of the size of S, in u."""

    bytes_moved: int | None = None
    """Device memory read and written, if operands that one launch reads more than once come from
    the L2 cache. Of vectors, only the tiles' partial sums are counted. None: not derived."""

    launches: int | None = None
    """Kernels and library products as large as a chunk of S; those over vectors and features, a
    fixed number, are left out."""

    extra_bytes: int | None = None
    """Most that is held beyond the operands, the gradients included."""

    rate: float = 1.0
    """Of bf16's matmul rate: a half in TF32."""

    def floor_ms(self, tflops: float, terabytes: float, unit: int) -> float:
        """The larger of the arithmetic's and the traffic's time, as if they overlapped wholly.

        Args:
            tflops: bf16 matmul rate in TFLOP/s.
            terabytes: memory bandwidth in TB/s.
            unit: u in FLOP.
        """
        arithmetic = self.units * unit / (tflops * self.rate * 1e9)
        return max(arithmetic, (self.bytes_moved or 0) / (terabytes * 1e9))


@dataclass(frozen=True)
class Variant:
    """A way to compute a loss, and what it costs."""

    name: str
    work: Callable[[Any], Work]
    """From a benchmark's case."""


def chunk_rows(case: Case) -> int:
    """Rows computed at a time: whole tiles, at least one."""
    whole_tiles = CHUNK_ELEMENTS // case.pairs // TILE * TILE
    return min(case.rows, max(TILE, whole_tiles))


def chunk_count(case: Case) -> int:
    """k."""
    return _ceil(case.rows, chunk_rows(case))


def kept_bytes(case: Case) -> int:
    """Bytes of a kept exponential: fp16 has too few exponents, and bf16 takes its place."""
    return max(2, case.element_bytes)


def kept_rows(case: Case, budget: int) -> int:
    """Rows of the whole chunks whose exponentials fit into the budget, in bytes."""
    fitting = budget // (kept_bytes(case) * case.pairs)
    return case.rows if fitting >= case.rows else fitting // chunk_rows(case) * chunk_rows(case)


def two_pass(budget: int) -> Callable[[Case], Work]:
    """The softmax loss's passes: 1u statistics, G, and 2u products with it.

    Exponentials of whole chunks that fit into the budget are kept from the first pass, and G is
    made of them; of the other rows, S is computed again: 4u without any, 3u with all.

    Args:
        budget: bytes for kept exponentials.
    """

    def work(case: Case) -> Work:
        statistics = _statistics(case)
        if case.part == "forward":
            return statistics
        kept, k = kept_rows(case, budget), chunk_count(case)
        again = case.rows - kept
        exponentials = kept_bytes(case) * kept * case.pairs
        # Written by the first pass and read by the second; of the others, features are read.
        moved = 2 * exponentials + case.element_bytes * case.dims * again
        moved += case.element_bytes * case.dims * case.pairs * _ceil(again, chunk_rows(case))
        return Work(
            units=3 + again / case.rows,
            bytes_moved=_sum(statistics.bytes_moved, moved, _products(case), _pairs(case)),
            launches=_sum(statistics.launches, 3 * k),
            extra_bytes=_peak(case) + exponentials,
        )

    return work


recompute, stored = two_pass(0), two_pass(1 << 50)


def sigmoid(case: Case) -> Work:
    """Sigmoid loss: the loss is a pass of its own (1u), G another (1u), and its products (2u).

    One pass could give both, at 3u; a forward must not compute G, so that there are two.
    """
    passes = 1 if case.part == "forward" else 2
    moved = passes * (_features(case) + 2 * _row_partials(case, 1))
    if passes == 1:
        return Work(1.0, moved, chunk_count(case), _row_partials(case, 1))
    moved += _products(case) + _pairs(case)
    return Work(4.0, moved, 4 * chunk_count(case), _peak(case))


def materialized(case: Case) -> Work:
    """open_clip's: both directions' logits by products of their own, 2u, and 4u of gradients."""
    return Work(2.0 if case.part == "forward" else 6.0)


def materialized_sigmoid(case: Case) -> Work:
    """open_clip's sigmoid loss: one product for the logits, two for the gradients."""
    return Work(1.0 if case.part == "forward" else 3.0)


def memeff(case: Case) -> Work:
    """1u of sums, and each tower's gradient by a kernel that recomputes S: 2u each.

    The second factor is padded to a power of two, D′: 1u + 2·(1 + D′/D)u. Beyond 1024 dims another
    kernel computes S once more and both products in TF32, which counts double.
    """
    if case.part == "forward":
        return Work(1.0)
    padded = 1 << (case.dims - 1).bit_length()
    return Work(1 + 2 * (1 + padded / case.dims) if padded <= 1024 else 2 + 2 * 2)


def inf_cl(case: Case) -> Work:
    """Two directions of 1u forward and 2u for each operand's gradient, in TF32."""
    return Work(2.0 if case.part == "forward" else 10.0, rate=0.5)


def cut_cross_entropy(case: Case) -> Work:
    """Two directions of 1u forward, and 3u that recompute S and multiply twice."""
    return Work(2.0 if case.part == "forward" else 8.0)


def siglip_kernel(case: Case) -> Work:
    """1u and both gradients' products, in the forward, whether or not a backward follows."""
    del case
    return Work(3.0)


CONTRASTIVE = (
    Variant("fastclip", recompute),
    Variant("fastclip-2gib", two_pass(2 << 30)),
    Variant("fastclip-8gib", two_pass(8 << 30)),
    Variant("fastclip-stored", stored),
    Variant("open_clip", materialized),
    Variant("memeff", memeff),
    Variant("inf-cl", inf_cl),
    Variant("cut-cross-entropy", cut_cross_entropy),
)
SIGMOID = (
    Variant("fastclip", sigmoid),
    Variant("open_clip", materialized_sigmoid),
    Variant("siglip-kernel", siglip_kernel),
)


def table(
    cases: Sequence[Any], variants: Sequence[Variant], tflops: float, terabytes: float
) -> str:
    """Every case with every variant, one line each, as text."""
    lines = [
        f"at {tflops:g} TFLOP/s and {terabytes:g} TB/s; nothing is measured",
        f"{'case':<50} {'variant':<18} {'u':>5} {'GB moved':>9} {'launches':>8} "
        f"{'extra MB':>9} {'floor ms':>9}",
    ]
    for case in cases:
        for variant in variants:
            work = variant.work(case)
            floor = work.floor_ms(tflops, terabytes, case.unit)
            lines.append(
                f"{case!s:<50} {variant.name:<18} {work.units:>5.3g} "
                f"{_cell(work.bytes_moved, 1e9, 2):>9} {_cell(work.launches, 1, 0):>8} "
                f"{_cell(work.extra_bytes, 1e6, 0):>9} {floor:>9.3g}"
            )
    return "\n".join(lines)


def _statistics(case: Case) -> Work:
    """A pass that reads the features and leaves two fp32 numbers per row and column of a tile."""
    partial = _row_partials(case, 2) + _column_partials(case, 2)
    peak = 2 * 4 * chunk_rows(case) * _ceil(case.pairs, TILE)
    peak += 2 * 4 * case.pairs * _ceil(chunk_rows(case), TILE)
    return Work(1.0, _features(case) + 2 * partial, chunk_count(case), peak)


def _products(case: Case) -> int:
    """Bytes of G, and of G·T and Gᵀ·I: G written once and read twice, fp32 results.

    Rows' products are complete with their chunk; the columns' are written by each, and read by each
    but the first.
    """
    k, features = chunk_count(case), case.element_bytes * case.dims
    moved = 3 * case.element_bytes * case.rows * case.pairs
    moved += features * (k * case.pairs + case.rows)
    return moved + 4 * case.dims * (case.rows + (2 * k - 1) * case.pairs)


def _pairs(case: Case) -> int:
    """Bytes of what is done with each of b pairs alone, before and after the passes.

    Norms and own products read the features; gradients are read in fp32 with the other tower's
    features, and written in the features' dtype. Normalised copies are written, and the features
    read once more for the derivative.
    """
    features = case.element_bytes * case.dims * 2 * case.rows
    return features * (5 if case.normalize else 3) + 4 * case.dims * 2 * case.rows


def _features(case: Case) -> int:
    """Rows once, columns once for each chunk."""
    columns = chunk_count(case) * case.pairs
    return case.element_bytes * case.dims * (case.rows + columns)


def _row_partials(case: Case, numbers: int) -> int:
    """Bytes of fp32 numbers per row and tile of columns."""
    return 4 * numbers * case.rows * _ceil(case.pairs, TILE)


def _column_partials(case: Case, numbers: int) -> int:
    """Bytes of fp32 numbers per column and tile of rows; a chunk is whole tiles, but the last."""
    return 4 * numbers * case.pairs * _ceil(case.rows, TILE)


def _peak(case: Case) -> int:
    """fp32 gradients, normalised copies, and the larger of a chunk of G and the final gradients."""
    towers = case.rows + case.pairs
    features = case.element_bytes * case.dims * towers
    chunk = case.element_bytes * chunk_rows(case) * case.pairs
    return 4 * case.dims * towers + case.normalize * features + max(chunk, features)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _sum(*parts: int | None) -> int:
    return sum(part or 0 for part in parts)


def _cell(value: int | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"
