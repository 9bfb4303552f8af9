"""What a variant has to compute and to move: the floor that a measured time is held against.

Symbols: b rows of this rank, N columns, D dims, e bytes of a feature, u = 2·b·N·D FLOP; S and G are
held in blocks, r of them above each other and c side by side. Every formula stands here; nothing is
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.cases import Case

BLOCK_ELEMENTS = 1 << 28
"""Entries of G that the kernels hold at a time."""

TILE = 128
"""Rows and columns of a tile of S on sm_90."""

SIGMOID_TILE = 64
"""Columns of the sigmoid loss's."""


class Work(NamedTuple):
    """One call."""

    units: float
    """Products of the size of S, in u."""

    bytes_moved: int | None = None
    """Device memory read and written, if operands that one launch reads more than once come from
    the L2 cache. Of vectors, only the tiles' partial sums are counted. None: not derived."""

    launches: int | None = None
    """Kernels and library products, of a single process."""

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


@dataclass(frozen=True)
class Blocks:
    """How S is cut."""

    height: int
    width: int
    above: int
    """r"""

    beside: int
    """c"""

    @property
    def count(self) -> int:
        """Blocks in all."""
        return self.above * self.beside


def blocks(case: Case) -> Blocks:
    """Square blocks of whole tiles; wider ones where there are few rows."""
    height = min(_whole_tiles(math.isqrt(BLOCK_ELEMENTS)), _whole_tiles(case.rows + TILE - 1))
    width = min(_whole_tiles(BLOCK_ELEMENTS // height), case.pairs)
    height = min(height, case.rows)
    return Blocks(height, width, _ceil(case.rows, height), _ceil(case.pairs, width))


def kept_elements(case: Case, budget: int) -> int:
    """Exponentials of the first whole blocks that fit into the budget, in bytes; none in fp16."""
    if case.dtype == "fp16":
        return 0
    kept = 0
    for height, width in _shapes(case):
        if (kept + height * width) * case.element_bytes > budget:
            break
        kept += height * width
    return kept


def two_pass(budget: int) -> Callable[[Case], Work]:
    """The softmax loss's passes: 1u statistics, G, and 2u products with it.

    Exponentials of whole blocks that fit into the budget are kept from the first pass, and G is
    made of them; for the others, S is computed again: 4u without any, 3u with all.

    Args:
        budget: bytes for kept exponentials.
    """

    def work(case: Case) -> Work:
        statistics = _statistics(case)
        if case.part == "forward":
            return statistics
        kept = kept_elements(case, budget)
        moved = 2 * case.element_bytes * kept  # written by the first pass, read by the second
        at, launches = 0, 2  # the scale's gradient, the features'
        for height, width in _shapes(case):
            at += height * width
            if at <= kept:
                launches += 4  # G made, where needed remade, two products
            else:
                launches += 3
                moved += case.element_bytes * case.dims * (height + width)
        launches += kept > 0  # the scale's gradient from the products
        return Work(
            units=4 - kept / (case.rows * case.pairs),
            bytes_moved=_sum(statistics.bytes_moved, moved, _products(case), _pairs(case)),
            launches=_sum(statistics.launches, launches),
            extra_bytes=_peak(case) + case.element_bytes * kept,
        )

    return work


recompute, stored = two_pass(0), two_pass(1 << 50)


def sigmoid(case: Case) -> Work:
    """Sigmoid loss: one pass for the loss and G (1u), and 2u products; a forward alone is 1u."""
    numbers = 12 * _ceil(case.rows, TILE) * _ceil(case.pairs, SIGMOID_TILE)  # three a tile
    moved = _features(case) + 2 * numbers
    if case.part == "forward":
        return Work(1.0, moved, None, numbers)
    return Work(3.0, moved + _products(case) + _pairs(case), None, _peak(case))


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


def _shapes(case: Case) -> Iterator[tuple[int, int]]:
    """Rows and columns of each block, in order."""
    cut = blocks(case)
    for row in range(cut.above):
        height = min(cut.height, case.rows - row * cut.height)
        for column in range(cut.beside):
            yield height, min(cut.width, case.pairs - column * cut.width)


def _statistics(case: Case) -> Work:
    """A pass that reads the features and leaves two fp32 numbers per row and column of a tile.

    Before it one launch for norms and own products, after it one for the loss; in each block the
    tiles, those that have to be done once more, and the sums over tiles.
    """
    cut = blocks(case)
    partial = _row_partials(case, 2) + _column_partials(case, 2)
    peak = 2 * 4 * (cut.height * _ceil(cut.width, TILE) + cut.width * _ceil(cut.height, TILE))
    return Work(1.0, _features(case) + 2 * partial, 2 + 3 * cut.count, peak)


def _products(case: Case) -> int:
    """Bytes of G, and of G·T and Gᵀ·I: G written once and read twice, fp32 results.

    Each block adds its rows' products and its columns' to what those beside and above it left.
    """
    cut = blocks(case)
    moved = 3 * case.element_bytes * case.rows * case.pairs + _features(case)
    results = (2 * cut.beside - 1) * case.rows + (2 * cut.above - 1) * case.pairs
    return moved + 4 * case.dims * results


def _pairs(case: Case) -> int:
    """Bytes of what is done with each of b pairs alone, before and after the passes.

    Norms and own products read the features; gradients are read in fp32 with the other tower's
    features, and written in the features' dtype. Normalised copies are written, and the features
    read once more for the derivative.
    """
    features = case.element_bytes * case.dims * 2 * case.rows
    return features * (5 if case.normalize else 3) + 4 * case.dims * 2 * case.rows


def _features(case: Case) -> int:
    """Rows once for each block beside another, columns once for each below another."""
    cut = blocks(case)
    return case.element_bytes * case.dims * (cut.beside * case.rows + cut.above * case.pairs)


def _row_partials(case: Case, numbers: int) -> int:
    """Bytes of fp32 numbers per row and tile of columns."""
    return 4 * numbers * case.rows * _ceil(case.pairs, TILE)


def _column_partials(case: Case, numbers: int) -> int:
    """Bytes of fp32 numbers per column and tile of rows; a block is whole tiles, but the last."""
    return 4 * numbers * case.pairs * _ceil(case.rows, TILE)


def _peak(case: Case) -> int:
    """fp32 gradients, normalised copies, and the larger of a block of G and the final gradients."""
    towers = case.rows + case.pairs
    features = case.element_bytes * case.dims * towers
    block = case.element_bytes * blocks(case).height * blocks(case).width
    return 4 * case.dims * towers + case.normalize * features + max(block, features)


def _whole_tiles(size: int) -> int:
    return max(TILE, size // TILE * TILE)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _sum(*parts: int | None) -> int:
    return sum(part or 0 for part in parts)


def _cell(value: int | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"
