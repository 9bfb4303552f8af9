"""How a goal's figure is read from rows: of each device the newest, ratios within one commit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import NamedTuple

from benchmarks import bench_step
from benchmarks.cases import Case
from benchmarks.check_kernels import CAPS
from benchmarks.rows import Row, beside, matches, newest
from benchmarks.steps import StepCase
from fastclip.flops import peak_flops_by_name

Rows = Callable[[str], Sequence[Row]]
"""From a benchmark's name to its rows."""


class Figure(NamedTuple):
    """One measured number; None where what was to be measured failed."""

    value: float | None
    row: Row


Measure = Callable[[Rows], list[Figure]]
"""A figure for each device; none where nothing was tried."""

OUR_STEPS = ("fastclip", "fastclip-compiled")
"""Our step, eager and compiled: a user takes the better one."""

_NO_PEER = "reference"
"""Our own loss in plain PyTorch."""


def value(name: str, column: str, times: float = 1.0, **cells: object) -> Measure:
    """A column of the newest row with these cells."""

    def measure(rows: Rows) -> list[Figure]:
        found = newest(rows(name), cells)
        return [Figure(_scaled(_number(row, column), times), row) for row in found]

    return measure


def quotient(
    name: str, column: str, over: Mapping[str, object], of: Mapping[str, object], **cells: object
) -> Measure:
    """A column of the row with the cells `over`, divided by that of the row with `of`."""

    def measure(rows: Rows) -> list[Figure]:
        figures = []
        for row in newest(rows(name), {**cells, **of}):
            for other in beside(rows(name), row, {**cells, **over})[-1:]:
                top, bottom = _number(other, column), _number(row, column)
                figures.append(Figure(top / bottom if top and bottom else None, row))
        return figures

    return measure


def over_peer(name: str, provider: str, case: Case | StepCase, of: str = "fastclip") -> Measure:
    """A peer's time over ours."""
    return quotient(name, "median_ms", {"provider": provider}, {"provider": of}, **asdict(case))


def over_exact_peers(case: Case) -> Measure:
    """The time of the fastest peer whose gradients are within the kernels' limit, over ours."""

    def measure(rows: Rows) -> list[Figure]:
        everything = rows("contrastive")
        exact = {
            row["provider"]
            for row in everything
            if matches(row, asdict(case))
            and not row["provider"].startswith("fastclip")
            and row["provider"] != _NO_PEER
            and row["gradient_error"]
            and float(row["gradient_error"]) <= CAPS[case.dtype]
        }
        return _fastest_over_fastest(everything, exact, ("fastclip",), asdict(case))

    return measure


def over_compiled_open_clip(case: StepCase) -> Measure:
    """Compiled open_clip's time of a step over ours."""

    def measure(rows: Rows) -> list[Figure]:
        return _fastest_over_fastest(rows("step"), ("open_clip-compiled",), OUR_STEPS, asdict(case))

    return measure


def utilisation(case: StepCase) -> Measure:
    """Executed arithmetic over the rate of the device's data sheet, in per cent."""
    works = {variant.name: variant.work for variant in bench_step.BENCHMARK.variants}

    def measure(rows: Rows) -> list[Figure]:
        executed = works["fastclip"](case).units
        best: dict[str, Figure] = {}
        for provider in OUR_STEPS:
            for row in newest(rows("step"), {"provider": provider, **asdict(case)}):
                device = row["device"]
                peak, rate = peak_flops_by_name(device, case.precision), _number(row, "tflops")
                if peak is None:
                    continue
                share = _scaled(rate, 100 * executed * 1e12 / peak)
                if device not in best or (share or 0.0) > (best[device].value or 0.0):
                    best[device] = Figure(share, row)
        return list(best.values())

    return measure


def guard_cost(case: StepCase) -> Measure:
    """What the guard adds to a step's time, in per cent."""
    whole = over_peer("step", "fastclip", case, of="fastclip-unguarded")

    def measure(rows: Rows) -> list[Figure]:
        return [
            figure._replace(value=None if figure.value is None else 100 * (figure.value - 1))
            for figure in whole(rows)
        ]

    return measure


def beside_open_clips_training(column: str, model: str, batch: int, *, relative: bool) -> Measure:
    """A mean over the seeds of whole trainings beside open_clip's: their ratio, or points more."""
    ours_are = {"provider": "fastclip", "error": "", "model": model, "batch": batch}

    def measure(rows: Rows) -> list[Figure]:
        figures = []
        for row in newest(rows("training"), ours_are):
            case = {name: row[name] for name in ("pairs", "model", "precision", "batch", "epochs")}
            means = []
            for provider in ("fastclip", "open_clip"):
                runs = beside(rows("training"), row, {"provider": provider, "error": "", **case})
                means.append(fmean([float(run[column]) for run in runs]) if runs else None)
            ours, theirs = means
            if ours is not None and theirs is not None:
                figures.append(Figure(ours / theirs if relative else 100 * (ours - theirs), row))
        return figures

    return measure


def _fastest_over_fastest(
    rows: Sequence[Row], theirs: Collection[str], ours: Collection[str], case: Mapping[str, object]
) -> list[Figure]:
    """Of each device on which both were tried."""
    figures = []
    for row in newest((row for row in rows if row["provider"] in ours), case):
        run = beside(rows, row, case)
        tried = [other for other in run if other["provider"] in theirs]
        if tried:
            best = _least(other for other in run if other["provider"] in ours)
            peer = _least(tried)
            figures.append(Figure(peer / best if peer and best else None, row))
    return figures


def _least(rows: Iterable[Row]) -> float | None:
    times = (_number(row, "median_ms") for row in rows)
    return min((time for time in times if time is not None), default=None)


def _number(row: Row, column: str) -> float | None:
    return float(row[column]) if row[column] and not row["error"] else None


def _scaled(number: float | None, times: float) -> float | None:
    return None if number is None else number * times
