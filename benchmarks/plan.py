"""What a variant has to compute and to move: the floor that a measured time is held against.

Symbols: b rows of this rank, N columns, D dims, e bytes of a feature, u = 2·b·N·D FLOP, k chunks of
rows. Every formula stands here; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    """Device memory read and written by the passes over S and G and by the gradients' products, if
    operands that a pass reads more than once come from the L2 cache; vectors are left out but for
    the tiles' partial sums. None: not derived."""

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
    work: Callable[[Case], Work]


def chunk_rows(case: Case) -> int:
    """Rows computed at a time: whole tiles, at least one."""
    whole_tiles = CHUNK_ELEMENTS // case.pairs // TILE * TILE
    return min(case.rows, max(TILE, whole_tiles))


def chunk_count(case: Case) -> int:
    """k."""
    return _ceil(case.rows, chunk_rows(case))


def recompute(case: Case) -> Work:
    """Softmax loss, S computed in both passes: 1u statistics, 1u again, 2u products."""
    if case.part == "forward":
        return _statistics(case)
    first, second = _statistics(case), _gradient_tiles(case)
    last = _products(case)
    return _normalized(
        case,
        Work(
            first.units + second.units + last.units,
            _sum(first.bytes_moved, second.bytes_moved, last.bytes_moved),
            _sum(first.launches, second.launches, last.launches),
            _peak(case, held=0, chunk=case.element_bytes * chunk_rows(case) * case.pairs),
        ),
    )


def stored(case: Case) -> Work:
    """Softmax loss with exponentials kept from the first pass: 1u statistics, 2u products.

    They are half-precision, b·N of them, written once and read by each product.
    """
    if case.part == "forward":
        return _statistics(case)
    exponentials = 2 * case.rows * case.pairs
    first, last = _statistics(case), _products(case)
    return _normalized(
        case,
        Work(
            first.units + last.units,
            _sum(first.bytes_moved, exponentials, last.bytes_moved),
            _sum(first.launches, last.launches),
            _peak(case, held=exponentials, chunk=0),
        ),
    )


def sigmoid(case: Case) -> Work:
    """Sigmoid loss: the loss is a pass of its own (1u), G another (1u), and its products (2u).

    One pass could give both, at 3u; a forward must not compute G, so that there are two.
    """
    return recompute(case)


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
    cases: Sequence[Case], variants: Sequence[Variant], tflops: float, terabytes: float
) -> str:
    """Every case with every variant, one line each, as text."""
    lines = [
        f"at {tflops:g} TFLOP/s and {terabytes:g} TB/s; nothing is measured",
        f"{'case':<44} {'variant':<18} {'u':>5} {'GB moved':>9} {'launches':>8} "
        f"{'extra MB':>9} {'floor ms':>9}",
    ]
    for case in cases:
        for variant in variants:
            work = variant.work(case)
            floor = work.floor_ms(tflops, terabytes, case.unit)
            lines.append(
                f"{case!s:<44} {variant.name:<18} {work.units:>5.3g} "
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


def _gradient_tiles(case: Case) -> Work:
    """A pass that reads the features, writes G, and one fp32 number per row of a tile."""
    written = case.element_bytes * case.rows * case.pairs
    return Work(1.0, _features(case) + written + 2 * _row_partials(case, 1), chunk_count(case))


def _products(case: Case) -> Work:
    """G·T and Gᵀ·I: G read twice, fp32 gradients, the columns' accumulated over chunks.

    The columns' part of a chunk is a product (written), which is added: read, and its sum read and
    written. At the end both gradients are read in fp32, and written in the features' dtype.
    """
    k, features = chunk_count(case), case.element_bytes * case.dims
    moved = 2 * case.element_bytes * case.rows * case.pairs
    moved += features * (k * case.pairs + case.rows)
    moved += 4 * case.dims * (case.rows + k * 4 * case.pairs)
    moved += (4 * case.dims + features) * (case.rows + case.pairs)
    return Work(2.0, moved, 2 * k)


def _normalized(case: Case, work: Work) -> Work:
    """With lengths in a pass over the features, and gradients taken through them in another."""
    if not case.normalize or work.bytes_moved is None:
        return work
    features = case.element_bytes * case.dims * (case.rows + case.pairs)
    return work._replace(bytes_moved=work.bytes_moved + 2 * features)


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


def _peak(case: Case, held: int, chunk: int) -> int:
    """fp32 gradients, what is held throughout, and the larger of a chunk's or the end's share.

    A chunk has its part of G and a product in fp32 that is added to the columns' gradient; at the
    end, the gradients are there in the features' dtype too.
    """
    towers = case.rows + case.pairs
    share = max(chunk + 4 * case.dims * case.pairs, case.element_bytes * case.dims * towers)
    return 4 * case.dims * towers + held + share


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _sum(*parts: int | None) -> int:
    return sum(part or 0 for part in parts)


def _cell(value: int | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"
