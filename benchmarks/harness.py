"""Providers × cases: each combination is measured once, and is one row of a CSV file.

A provider is one way to compute something. What goes wrong with it on a case, out of memory
included, is the row's result; the next one is measured all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import plan, record, timing

RESUME = 75
"""Exit status when the device is lost to a kernel's error: the same command goes on from there."""

HUNG = "hung: the process was killed during it; without this row it is measured again"
"""Error of a measurement that an earlier process began and did not survive."""

RESULT_COLUMNS = (
    "median_ms", "p20_ms", "p80_ms", "runs", "graph_ms", "graph_error", "peak_bytes", "tflops",
    "matmul_tflops", "matmul_share",
)  # fmt: skip
"""`tflops`, and with it `matmul_share` (its ratio to `matmul_tflops`), counts the same work for all
providers of a case. One that computes less, as fastclip-stored does (3u and a little, counted as
4u), keeps the device less busy than its share says. `runs` is 1 where one call took longer than the
time for a row; there is no graph then."""

AnyCase = Any
"""A benchmark's own frozen dataclass, with `unit`, the FLOP of one product of its matrix."""


@dataclass(frozen=True)
class Provider:
    """One way to compute what a benchmark measures."""

    name: str

    build: Callable[[AnyCase], Callable[[Any], Any]]
    """Imports what is needed and returns what is measured: from operands to a result. If that has a
    method `close`, it is called at the end."""

    module: str = "fastclip"
    """Must be importable."""

    distribution: str = "fastclip-torch"
    """Whose version is recorded."""

    install: str = "-e ."
    """pip's arguments that install it."""

    needs_cuda: bool = True

    graph: bool = False
    """Whether to time replays of it as a CUDA graph too."""

    accepts: Callable[[AnyCase], bool] = lambda case: True

    def present(self) -> bool:
        """Whether its module is installed; of it, nothing is executed."""
        return importlib.util.find_spec(self.module) is not None


@dataclass(frozen=True)
class Benchmark:
    """Something to compute, with the ways to do so and the shapes to do it on."""

    name: str
    """Of the program and of the file of results."""

    case_type: type
    providers: tuple[Provider, ...]
    sets: Mapping[str, tuple[AnyCase, ...]]
    """Of cases, `small` and `tiny` among them: the defaults on a GPU and on a CPU."""

    variants: tuple[plan.Variant, ...]

    operands: Callable[[AnyCase, torch.device], Any]
    expected: Callable[[AnyCase, Any], Any]
    """From a case and its operands to what is expected, in fp64; None where nothing is."""

    errors: Callable[[Any, Any], Mapping[str, float | None]]
    """From what is expected and a result to cells of `error_columns`."""

    error_columns: tuple[str, ...]

    counted_units: Callable[[AnyCase], int]
    """Products in `unit` that TFLOP/s are counted in, whatever a provider computes."""

    @property
    def key(self) -> tuple[str, ...]:
        """Columns that say which measurement a row is."""
        case = (field.name for field in fields(self.case_type))
        return ("commit", "dirty", "device", "provider", *case)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, in order."""
        case = (field.name for field in fields(self.case_type))
        results = (*RESULT_COLUMNS, *self.error_columns, "error")
        return (*record.STAMP_COLUMNS, "provider", "version", *case, *results)


def measure(
    provider: Provider,
    case: AnyCase,
    operands: Any,
    errors: Callable[[Any], Mapping[str, float | None]],
    device: torch.device,
    seconds: float,
) -> dict[str, object]:
    """Cells of a row, without the stamp; an exception's first line as `error`, and then no times.

    Args:
        operands: None where they did not fit in the device's memory.
        errors: of a result.
        seconds: see `run`.
    """
    if operands is None:
        return {"error": "OOM: the operands alone"}
    cells: dict[str, object] = {}
    try:
        _fill(cells, provider, case, operands, errors, device, seconds)
    except Exception as error:
        cells["error"] = one_line(error)
    # Only now that the step has no name left. Where the device is lost, anything may fail again.
    with contextlib.suppress(Exception):
        torch._dynamo.reset()
    gc.collect()
    return cells


def _fill(
    cells: dict[str, object],
    provider: Provider,
    case: AnyCase,
    operands: Any,
    errors: Callable[[Any], Mapping[str, float | None]],
    device: torch.device,
    seconds: float,
) -> None:
    """What `measure` does, as far as it may fail."""
    step = provider.build(case)
    try:
        result = step(operands)  # compiles
        cells.update(errors(result))
        del result
        times, peak = timing.times_and_peak(lambda: step(operands), device, seconds)
        cells["peak_bytes"] = peak
        if provider.graph and device.type == "cuda" and times.runs > 1:
            try:
                replays = timing.time_graph(lambda: step(operands), device, seconds / 2)
                cells["graph_ms"] = replays.median
            except RuntimeError as error:
                cells["graph_error"] = one_line(error)
        cells.update(zip(("median_ms", "p20_ms", "p80_ms", "runs"), times, strict=True))
    finally:
        try:
            getattr(step, "close", lambda: None)()
        except Exception as error:  # after all times, or after an error that says more
            print(f"{provider.name}: not closed: {one_line(error)}")


def run(
    benchmark: Benchmark,
    cases: Sequence[AnyCase],
    providers: Sequence[Provider],
    rows: record.Record,
    stamp: record.Stamp,
    device: torch.device,
    *,
    seconds: float = 1.0,
    reference_tflop: float = 200.0,
) -> int:
    """Measure what `rows` does not hold yet; the exit status.

    Args:
        seconds: spent on the times of one row, roughly; warm-up and compilation come on top.
        reference_tflop: largest product of the size of S, in 10¹² FLOP, for which errors are
            computed; it runs in fp64.
    """
    providers = [provider for provider in providers if _usable(provider, device)]
    started = watch(rows)
    rate: float | None = None
    for case in cases:
        todo = [
            provider
            for provider in providers
            if provider.accepts(case) and not rows.has(_key(stamp, provider, case))
        ]
        if not todo:
            continue
        rate = rate or timing.matmul_tflops(device)
        operands, errors = _prepare(benchmark, case, device, reference_tflop)
        for provider in todo:
            row = {
                **stamp.columns(),
                **_key(stamp, provider, case),
                "version": record.version_of(provider.distribution),
            }
            with started.during(row):
                cells = measure(provider, case, operands, errors, device, seconds)
                cells |= _rates(cells, benchmark.counted_units(case) * case.unit, rate)
                rows.write({**row, **cells})
            print(f"{case} | {provider.name}: {_summary(cells)}", flush=True)
            if not alive(device):
                print("the device is lost to that error; run the same command again to go on")
                return RESUME
        del operands, errors  # before the next case's are made beside them
    return 0


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """The command line of a benchmark; returns the exit status."""
    options = _parser(benchmark).parse_args(arguments)
    device = torch.device(options.device)
    names = options.cases or ["small" if device.type == "cuda" else "tiny"]
    cases = list(dict.fromkeys(case for name in names for case in benchmark.sets[name]))
    if options.plan:
        print(plan.table(cases, benchmark.variants, options.tflops, options.bandwidth))
        return 0
    chosen = options.providers or [provider.name for provider in benchmark.providers]
    providers = [provider for provider in benchmark.providers if provider.name in chosen]
    try:
        stamp = record.stamp(options.commit, options.dirty, device)
        rows = record.Record(
            options.out / f"{benchmark.name}.csv", benchmark.columns, benchmark.key
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return run(
        benchmark, cases, providers, rows, stamp, device,
        seconds=options.seconds, reference_tflop=options.reference_tflop,
    )  # fmt: skip


def watch(rows: record.Record) -> record.Started:
    """To be held during each measurement; one that killed an earlier process becomes a row."""
    started = record.Started(rows.path.with_suffix(".started"))
    killed = started.left_behind()
    if killed is not None and not rows.has(killed):
        rows.write({**killed, "error": HUNG})
        print(f"{killed['provider']}: {HUNG}")
    return started


def finish(status: int) -> NoReturn:
    """End the process; at once if the device is lost, since tearing CUDA down could abort it."""
    if status == RESUME:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{benchmark.name}")
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(benchmark.sets), help="default: small; on a CPU, tiny")
    names = [provider.name for provider in benchmark.providers]
    add("--providers", nargs="+", choices=names, help="default: all that are installed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=1.0, help="spent on a row's times (default 1)")
    add("--reference-tflop", type=float, default=200.0, help="no errors for larger S (default 200)")
    add("--out", type=Path, default=record.RESULTS, help="folder of the CSV file")
    add("--commit", help="default: git's")
    add("--dirty", action="store_true", help="the files differ from the commit")
    add("--plan", action="store_true", help="print what is to be computed and moved; run nothing")
    add("--tflops", type=float, default=800.0, help="of the plan's device (default 800)")
    add("--bandwidth", type=float, default=3.0, help="of the plan's device in TB/s (default 3.0)")
    return parser


def _prepare(
    benchmark: Benchmark, case: AnyCase, device: torch.device, reference_tflop: float
) -> tuple[Any, Callable[[Any], Mapping[str, float | None]]]:
    """A case's operands, None if they do not fit, and the errors of a result, none if too large."""
    try:
        operands = benchmark.operands(case, device)
    except torch.OutOfMemoryError:
        return None, lambda result: {}
    try:
        cheap = case.unit <= reference_tflop * 1e12
        expected = benchmark.expected(case, operands) if cheap else None
    except torch.OutOfMemoryError:
        expected = None
    if expected is None:
        return operands, lambda result: {}
    return operands, lambda result: benchmark.errors(expected, result)


def _usable(provider: Provider, device: torch.device) -> bool:
    if not provider.present():
        print(f"{provider.name}: not installed (pip install {provider.install})")
        return False
    if provider.needs_cuda and device.type != "cuda":
        print(f"{provider.name}: needs a CUDA device")
        return False
    return True


def _key(stamp: record.Stamp, provider: Provider, case: AnyCase) -> dict[str, object]:
    return {**asdict(stamp), "provider": provider.name, **asdict(case)}


def _rates(
    cells: Mapping[str, object], counted: float, matmul_rate: float | None
) -> dict[str, object]:
    """TFLOP/s of the counted work, beside the matmul's."""
    median = cells.get("median_ms")
    if not isinstance(median, float):
        return {"matmul_tflops": matmul_rate}
    tflops = counted / median / 1e9
    share = tflops / matmul_rate if matmul_rate else None
    return {"tflops": tflops, "matmul_tflops": matmul_rate, "matmul_share": share}


def _summary(cells: Mapping[str, object]) -> str:
    if "error" in cells:
        return str(cells["error"])
    parts = [f"{cells['median_ms']:.4g} ms", f"{cells['tflops']:.4g} TFLOP/s"]
    peak = cells.get("peak_bytes")
    parts.append("– MB" if not isinstance(peak, int) else f"{peak / 1e6:.0f} MB")
    parts += [
        f"{name.replace('_', ' ')} {value:.1e}"
        for name, value in cells.items()
        if name.endswith("_error") and isinstance(value, float)
    ]
    return ", ".join(parts)


def one_line(error: BaseException) -> str:
    """An exception as one short line; out of memory by its usual name."""
    if isinstance(error, torch.OutOfMemoryError):
        return "OOM"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def alive(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access every later call fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
