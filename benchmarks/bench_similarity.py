"""Similarities and nearest keys beside plain torch: ``python -m benchmarks.bench_similarity``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.harness import Benchmark, Provider, finish, main
from benchmarks.plan import Variant, Work
from fastclip.ops.dispatch import Impl

CHUNK_KEYS = 1 << 16
SAMPLE = 64
"""Evenly spaced queries whose results are compared with fp64."""


@dataclass(frozen=True)
class SimilarityCase:
    """Queries against keys, both of any length; TFLOP/s are counted in one product."""

    queries: int
    """M."""

    keys: int
    """N."""

    dims: int
    """D."""

    dtype: str = "bf16"

    k: int = 0
    """Nearest keys of each query that are asked for; 0: the whole matrix."""

    @property
    def unit(self) -> int:
        """u = 2·M·N·D, FLOP of the product."""
        return 2 * self.queries * self.keys * self.dims

    def __str__(self) -> str:
        asked = f"top {self.k}" if self.k else "matrix"
        return f"{self.queries}×{self.keys}, D={self.dims}, {self.dtype}, {asked}"


class Operands(NamedTuple):
    """Features of any length."""

    queries: Tensor
    """[M, D]."""

    keys: Tensor
    """[N, D]."""


class Expected(NamedTuple):
    """fp64 results of a sample of queries."""

    sample: Tensor
    """int64 [q]."""

    values: Tensor
    """[q, N], or the largest [q, k]."""

    indices: Tensor | None
    """[q, k]."""


Call = Callable[[Operands], tuple[Tensor, Tensor | None]]
"""From operands to the matrix and None, or to the largest and their keys."""


def fastclip(impl: Impl) -> Callable[[SimilarityCase], Call]:
    """This project's operators."""

    def build(case: SimilarityCase) -> Call:
        from fastclip.ops.similarity import similarity, similarity_topk

        if case.k:
            return lambda operands: similarity_topk(*operands, case.k, normalize=True, impl=impl)
        return lambda operands: (similarity(*operands, 1.0, normalize=True, impl=impl), None)

    return build


def plain(case: SimilarityCase) -> Call:
    """Normalised features, their product in their dtype, and torch.topk of the whole matrix."""

    def call(operands: Operands) -> tuple[Tensor, Tensor | None]:
        queries, keys = (F.normalize(x, dim=1) for x in operands)
        matrix = (queries @ keys.T).float()
        if not case.k:
            return matrix, None
        values, indices = matrix.topk(case.k, dim=1)
        return values, indices

    return call


def compiled(case: SimilarityCase) -> Call:
    """`plain` under torch.compile, for one shape."""
    return torch.compile(plain(case), dynamic=False)


def make_operands(case: SimilarityCase, device: torch.device) -> Operands:
    """Random features, the same for every provider on a device."""
    generator = torch.Generator(device).manual_seed(0)
    queries, keys = (
        torch.randn(count, case.dims, generator=generator, device=device).to(DTYPES[case.dtype])
        for count in (case.queries, case.keys)
    )
    return Operands(queries, keys)


def expected(case: SimilarityCase, operands: Operands) -> Expected:
    """fp64 cosines of a sample of queries with all keys, and the largest of them."""
    count = min(SAMPLE, case.queries)
    sample = torch.arange(count, device=operands.queries.device) * case.queries // count
    queries = F.normalize(operands.queries[sample].double(), dim=1)
    parts = [queries @ F.normalize(keys.double()).T for keys in operands.keys.split(CHUNK_KEYS)]
    values = torch.cat(parts, dim=1)
    if not case.k:
        return Expected(sample, values, None)
    values, indices = values.topk(case.k, dim=1)
    return Expected(sample, values, indices)


def errors(expected: Expected, result: tuple[Tensor, Tensor | None]) -> Mapping[str, float | None]:
    """Relative error of the values, and which share of the expected keys is not among the result's.

    Keys that are as near as the last one up to rounding may rightly be missed.
    """
    values, indices = result
    difference = values[expected.sample].double() - expected.values
    error = float(difference.norm() / expected.values.norm())
    if indices is None or expected.indices is None:
        return {"value_error": error, "missed": None}
    found = (indices[expected.sample][:, :, None] == expected.indices[:, None, :]).any(1)
    return {"value_error": error, "missed": 1 - float(found.double().mean())}


def fused_work(case: SimilarityCase) -> Work:
    """Each operand read once, norms on the way; the matrix in fp32, or k numbers and keys."""
    written = case.queries * (12 * case.k if case.k else 4 * case.keys)
    read = DTYPES[case.dtype].itemsize * case.dims * (case.queries + case.keys)
    return Work(1.0, read + written, 1, written)


def plain_work(case: SimilarityCase) -> Work:
    """Normalised copies written and read, the matrix in two dtypes, and read again for the top."""
    size = DTYPES[case.dtype].itemsize
    features = size * case.dims * (case.queries + case.keys)
    matrix = case.queries * case.keys
    top = 4 * matrix + 12 * case.k * case.queries if case.k else 0
    moved = 3 * features + 2 * size * matrix + 4 * matrix + top
    return Work(1.0, moved, 3 if case.k else 2, features + (size + 4) * matrix)


PROVIDERS = (
    Provider("fastclip", fastclip("triton"), module="fastclip.ops.similarity", graph=True),
    Provider(
        "reference", fastclip("reference"), module="fastclip.ops.similarity", needs_cuda=False
    ),
    Provider("torch", plain, "torch", "torch", "torch", needs_cuda=False),
    Provider("torch-compile", compiled, "torch", "torch", "torch"),
)
SETS = {
    "tiny": (SimilarityCase(40, 30, 16, "fp32"), SimilarityCase(40, 30, 16, "fp32", k=5)),
    # Zero-shot classification, retrieval, nearest neighbours in a large collection.
    "small": (
        SimilarityCase(50_000, 1_000, 768),
        SimilarityCase(32_768, 32_768, 768),
        SimilarityCase(25_000, 5_000, 512, k=10),
        SimilarityCase(8_192, 131_072, 768, k=10),
        SimilarityCase(1_024, 1 << 20, 512, k=100),
    ),
}
SETS["all"] = SETS["small"]

BENCHMARK = Benchmark(
    name="similarity",
    case_type=SimilarityCase,
    providers=PROVIDERS,
    sets=SETS,
    variants=(Variant("fastclip", fused_work), Variant("torch", plain_work)),
    operands=make_operands,
    expected=expected,
    errors=errors,
    error_columns=("value_error", "missed"),
    counted_units=lambda case: 1,
)

if __name__ == "__main__":
    finish(main(BENCHMARK))
