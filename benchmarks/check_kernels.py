"""The Triton kernels on ragged shapes, against fp64: ``python -m benchmarks.check_kernels``.

Not a benchmark, but what stands before one: each error is a row, and one above its limit fails the
program. It is also what a sanitizer runs. On a CPU it needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from benchmarks import accuracy, bench_contrastive, bench_sigmoid, losses, peers, record
from benchmarks.cases import Case
from benchmarks.harness import Benchmark
from benchmarks.losses import Definition, Loss, autograd_step, make_operands

SHAPES = (
    (130, 64, False), (67, 640, True), (131, 512, False), (97, 768, False), (33, 1024, False),
    (65, 1152, True), (1_023, 768, False),
)  # fmt: skip
"""Pairs, dims, and whether features come at any length."""

QUICK = 2
"""So many of them are enough for a sanitizer."""

SCALES = (1.0, 14.285714, 100.0)

CAPS = {"fp32": 1e-4, "bf16": 2e-3, "fp16": 2e-3}
"""Gradients' largest relative errors for unit features, where the loss is above 0.05."""

KEPT_CAP = 3e-3
"""The same in bf16 where exponentials are kept: these, G and the result are each rounded once."""

ROUNDING = {"fp32": 5e-6, "bf16": 1e-4, "fp16": 1e-4}
"""Allowed in any case, should the plain path be right by luck."""

HALF_STEP = {"fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-12}
"""What rounding takes from a number, at most, relative to it."""

LOSS_CAP = 1e-5
"""The loss's, under the same conditions."""

CASE_COLUMNS = tuple(field.name for field in fields(Case))
KEY = ("commit", "dirty", "device", "benchmark", "provider", *CASE_COLUMNS)
COLUMNS = (
    *record.STAMP_COLUMNS, "benchmark", "provider", *CASE_COLUMNS, "loss", "loss_error",
    "loss_limit", "gradient_error", "gradient_limit", "passed",
)  # fmt: skip

LOSSES: tuple[tuple[Benchmark, Definition, Loss], ...] = (
    (bench_contrastive.BENCHMARK, losses.CONTRASTIVE, peers.plain_contrastive),
    (bench_sigmoid.BENCHMARK, losses.SIGMOID, peers.plain_sigmoid),
)


def cases(quick: bool, dtypes: Sequence[str]) -> Iterator[Case]:
    """Every shape at every scale and dtype; a few of them if `quick`."""
    shapes = SHAPES[: QUICK if quick else None]
    for (pairs, dims, normalize), dtype, scale in itertools.product(shapes, dtypes, SCALES):
        yield Case(pairs, dims, dtype, scale, normalize=normalize)


def check(
    benchmark: Benchmark, definition: Definition, plain: Loss, case: Case, device: torch.device
) -> Iterator[dict[str, object]]:
    """One row per Triton provider: its errors and whether they are within the contract.

    Errors are at most 1.5 times the plain torch path's in the same dtype, and under a cap where the
    loss is not close to 0. Lengths have no cap: in half precision, unit features are rounded before
    they are multiplied, and long features' gradients underflow. There the loss may be off by what
    rounding changes in an entry of S: the plain path is nearer by luck.
    """
    operands = make_operands(case, definition.bias, device)
    expected = losses.expectation(definition, case, operands)
    theirs = accuracy.errors(expected, *autograd_step(plain, case)(operands))
    assert theirs.gradient is not None
    uncapped = max(1.5 * theirs.gradient, ROUNDING[case.dtype])
    loss_limit = max(1.5 * theirs.loss, LOSS_CAP)
    if case.normalize:
        entry = HALF_STEP[case.dtype] * case.scale / case.dims**0.5
        loss_limit = max(loss_limit, entry / expected.loss)
    capped = expected.loss > 0.05 and not case.normalize
    if capped:
        loss_limit = LOSS_CAP
    for provider in benchmark.providers:
        if not provider.name.startswith("fastclip") or not provider.accepts(case):
            continue
        kept = case.dtype == "bf16" and provider.name != "fastclip"
        cap = KEPT_CAP if kept else CAPS[case.dtype]
        limit = min(uncapped, cap) if capped else uncapped
        mine = accuracy.errors(expected, *provider.build(case)(operands))
        assert mine.gradient is not None
        # NaN is not less than anything, and so does not pass.
        passed = mine.gradient <= limit and mine.loss <= loss_limit
        yield {
            "benchmark": benchmark.name,
            "provider": provider.name,
            **asdict(case),
            "loss": expected.loss,
            "loss_error": mine.loss,
            "gradient_error": mine.gradient,
            "loss_limit": loss_limit,
            "gradient_limit": limit,
            "passed": passed,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 1 if an error is above its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_kernels")
    parser.add_argument(
        "--quick", action="store_true", help="few shapes, as a sanitizer wants them"
    )
    parser.add_argument(
        "--no-judge", action="store_true", help="only launch: errors are rows, and fail nothing"
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--dirty", action="store_true", help="the files differ from the commit")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The interpreter multiplies bf16 as if it were integers.
    dtypes = tuple(CAPS) if device.type == "cuda" else ("fp32", "fp16")
    try:
        stamp = record.stamp(options.commit, options.dirty, device)
        rows = record.Record(options.out / "check_kernels.csv", COLUMNS, KEY)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failed = done = 0
    for case, loss in itertools.product(cases(options.quick, dtypes), LOSSES):
        for row in check(*loss, case, device):
            done += 1
            if not row["passed"]:
                failed += 1
                print(f"FAILED {case}: {row}")
            rows.write({**stamp.columns(), **row})
    print(f"check_kernels: {done} checked, {failed} above their limit")
    return int(failed > 0 and not options.no_judge)


if __name__ == "__main__":
    sys.exit(main())
