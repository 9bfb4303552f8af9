"""Providers × cases: each combination is measured once, and is one row of a CSV file.

A provider is one way to compute a loss. What goes wrong with it on a case, out of memory included,
is the row's result; the next one is measured all the same.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import accuracy, plan, record, timing
from benchmarks.cases import DTYPES, Case

RESUME = 75
"""Exit status when the device is lost to a kernel's error: the same command goes on from there."""

RESULT_COLUMNS = (
    "median_ms", "p20_ms", "p80_ms", "runs", "graph_ms", "graph_error", "peak_bytes", "tflops",
    "matmul_tflops", "matmul_share", "loss_error", "gradient_error", "error",
)  # fmt: skip
CASE_COLUMNS = tuple(field.name for field in fields(Case))
COLUMNS = (*record.STAMP_COLUMNS, "provider", "version", *CASE_COLUMNS, *RESULT_COLUMNS)
KEY = ("commit", "dirty", "device", "provider", *CASE_COLUMNS)


class Operands(NamedTuple):
    """What a loss is given; all are leaves that require gradients."""

    image: Tensor
    """[N, D] of the case's dtype."""

    text: Tensor
    """[N, D] of the case's dtype; row i belongs to image i."""

    scale: Tensor
    """fp32 []."""

    bias: Tensor | None
    """fp32 [], of the sigmoid loss."""


class Result(NamedTuple):
    """What a provider computes; gradients by the features as given, None in a forward."""

    loss: Tensor
    d_image: Tensor | None = None
    d_text: Tensor | None = None


Step = Callable[[Operands], Result]
Loss = Callable[..., Tensor]
"""From image and text features, scale and, of the sigmoid loss, bias to the loss, []."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a loss."""

    name: str

    build: Callable[[Case], Step]
    """Imports what is needed and returns what is measured."""

    module: str = "fastclip"
    """Must be importable."""

    distribution: str = "fastclip-torch"
    """Whose version is recorded."""

    install: str = "-e ."
    """pip's arguments that install it."""

    needs_cuda: bool = True

    graph: bool = False
    """Whether to time replays of it as a CUDA graph too."""

    accepts: Callable[[Case], bool] = lambda case: case.world == 1

    def present(self) -> bool:
        """Whether its module is installed; nothing is imported."""
        return importlib.util.find_spec(self.module) is not None


@dataclass(frozen=True)
class Benchmark:
    """A loss with the ways to compute it and the shapes to compute it on."""

    name: str
    """Of the program and of the file of results."""

    providers: tuple[Provider, ...]
    sets: Mapping[str, tuple[Case, ...]]
    bias: float | None
    expected: Callable[[Tensor, Tensor, float, float | None, bool], accuracy.Expected]
    variants: tuple[plan.Variant, ...]

    step_units: int
    """Products of the size of S that TFLOP/s of a step are counted in, whatever is computed."""


def autograd_step(loss: Loss, case: Case, normalizes: bool = False) -> Step:
    """A step from a loss that autograd differentiates.

    Args:
        loss: see `Loss`.
        normalizes: whether it brings features to unit length itself where the case asks for that.
    """

    def forward(operands: Operands) -> Tensor:
        image, text, scale, bias = operands
        if case.normalize and not normalizes:
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        return loss(image, text, scale) if bias is None else loss(image, text, scale, bias)

    def step(operands: Operands) -> Result:
        if case.part == "forward":
            with torch.no_grad():
                return Result(forward(operands))
        value = forward(operands)
        leaves = [leaf for leaf in operands if leaf is not None]
        # Not every peer has a gradient for the scale.
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return Result(value.detach(), gradients[0], gradients[1])

    return step


def make_operands(case: Case, bias: float | None, device: torch.device, seed: int = 0) -> Operands:
    """Random features of a case, the same for every provider on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.pairs, case.dims)
    image = torch.randn(shape, generator=generator, device=device)
    text = torch.randn(shape, generator=generator, device=device).mul_(case.noise).add_(image)
    features = (image, text) if case.normalize else (F.normalize(image), F.normalize(text))
    image, text = (x.to(DTYPES[case.dtype]).requires_grad_() for x in features)
    scale = torch.tensor(case.scale, device=device, requires_grad=True)
    shift = None if bias is None else torch.tensor(bias, device=device, requires_grad=True)
    return Operands(image, text, scale, shift)


def measure(
    provider: Provider,
    case: Case,
    operands: Operands | None,
    expected: accuracy.Expected | None,
    seconds: float,
) -> dict[str, object]:
    """Cells of a row, without the stamp; an exception's first line as `error`, and then no times.

    Args:
        operands: None where they did not fit in the device's memory.
        expected: None where errors are not asked for.
        seconds: see `run`.
    """
    if operands is None:
        return {"error": "OOM: the features alone"}
    device = operands.image.device
    cells: dict[str, object] = {}
    try:
        step = provider.build(case)
        result = step(operands)  # compiles
        if expected is not None:
            cells["loss_error"], cells["gradient_error"] = accuracy.errors(expected, *result)
        del result
        cells["peak_bytes"] = timing.peak_extra_bytes(lambda: step(operands), device)
        times = timing.time_calls(lambda: step(operands), device, seconds)
        if provider.graph and device.type == "cuda":
            try:
                replays = timing.time_graph(lambda: step(operands), device, seconds / 2)
                cells["graph_ms"] = replays.median
            except RuntimeError as error:
                cells["graph_error"] = _one_line(error)
        cells |= zip(("median_ms", "p20_ms", "p80_ms", "runs"), times, strict=True)
    except Exception as error:
        cells["error"] = _one_line(error)
    torch._dynamo.reset()
    gc.collect()
    return cells


def run(
    benchmark: Benchmark,
    cases: Sequence[Case],
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
        operands, expected = _prepare(benchmark, case, device, reference_tflop)
        for provider in todo:
            cells = measure(provider, case, operands, expected, seconds)
            cells |= _rates(cells, case, benchmark.step_units, rate)
            rows.write(
                {
                    **stamp.columns(),
                    **_key(stamp, provider, case),
                    "version": record.version_of(provider.distribution),
                    **cells,
                }
            )
            print(f"{case} | {provider.name}: {_summary(cells)}", flush=True)
            if not _alive(device):
                print("the device is lost to that error; run the same command again to go on")
                return RESUME
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
        rows = record.Record(options.out / f"{benchmark.name}.csv", COLUMNS, KEY)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return run(
        benchmark, cases, providers, rows, stamp, device,
        seconds=options.seconds, reference_tflop=options.reference_tflop,
    )  # fmt: skip


def _parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{benchmark.name}")
    add = parser.add_argument
    add("--cases", nargs="+", choices=benchmark.sets, help="default: small; on a CPU, tiny")
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
    benchmark: Benchmark, case: Case, device: torch.device, reference_tflop: float
) -> tuple[Operands | None, accuracy.Expected | None]:
    """A case's operands and what they should give; None for what does not fit or is too much."""
    try:
        operands = make_operands(case, benchmark.bias, device)
    except torch.OutOfMemoryError:
        return None, None
    if case.world > 1 or case.unit > reference_tflop * 1e12:
        return operands, None
    image, text = operands.image, operands.text
    try:
        expected = benchmark.expected(image, text, case.scale, benchmark.bias, case.normalize)
    except torch.OutOfMemoryError:
        expected = None
    return operands, expected


def _usable(provider: Provider, device: torch.device) -> bool:
    if not provider.present():
        print(f"{provider.name}: not installed (pip install {provider.install})")
        return False
    if provider.needs_cuda and device.type != "cuda":
        print(f"{provider.name}: needs a CUDA device")
        return False
    return True


def _key(stamp: record.Stamp, provider: Provider, case: Case) -> dict[str, object]:
    return {**asdict(stamp), "provider": provider.name, **asdict(case)}


def _rates(
    cells: Mapping[str, object], case: Case, step_units: int, matmul_rate: float | None
) -> dict[str, object]:
    """TFLOP/s of the counted work, beside the matmul's."""
    median = cells.get("median_ms")
    if not isinstance(median, float):
        return {"matmul_tflops": matmul_rate}
    units = step_units if case.part == "step" else 1
    tflops = units * case.unit / median / 1e9
    share = tflops / matmul_rate if matmul_rate else None
    return {"tflops": tflops, "matmul_tflops": matmul_rate, "matmul_share": share}


def _summary(cells: Mapping[str, object]) -> str:
    if "error" in cells:
        return str(cells["error"])
    parts = [f"{cells['median_ms']:.4g} ms", f"{cells['tflops']:.4g} TFLOP/s"]
    peak, error = cells.get("peak_bytes"), cells.get("gradient_error")
    parts.append("– MB" if not isinstance(peak, int) else f"{peak / 1e6:.0f} MB")
    parts += [f"gradient error {error:.1e}"] if isinstance(error, float) else []
    return ", ".join(parts)


def _one_line(error: BaseException) -> str:
    """An exception as one short line; out of memory by its usual name."""
    if isinstance(error, torch.OutOfMemoryError):
        return "OOM"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _alive(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access every later call fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
