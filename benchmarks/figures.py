"""Figures of what was measured on GPUs: losses over N, steps of each model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench_step import FITTING
from benchmarks.cases import CONTRASTIVE_SETS, SIGMOID_SETS
from benchmarks.goal_measures import Rows
from benchmarks.rows import Row, matches, on_gpu, stamp
from benchmarks.steps import StepCase
from fastclip.report.drawing import new_figure, save_figure

OURS = "fastclip"
LOSSES = (
    ("contrastive", "softmax loss", CONTRASTIVE_SETS),
    ("sigmoid", "sigmoid loss", SIGMOID_SETS),
)
MEASURED = (
    ("median_ms", "loss and gradients (ms)", 1.0),
    ("peak_bytes", "memory beyond the features (GB)", 1e-9),
)
"""Column, label, factor."""
STEPS = ("fastclip", "fastclip-compiled", "open_clip", "open_clip-compiled")


@dataclass(frozen=True)
class BenchmarkFigure:
    """A picture made of rows."""

    title: str
    file: str
    select: Callable[[Rows], Sequence[Row]]
    """Rows that it would show: of one GPU."""
    paint: Callable[[Any, Sequence[Row]], None]
    size: tuple[float, float]

    def drawable(self, rows: Rows) -> bool:
        """Whether there is anything to show."""
        return bool(self.select(rows))

    def draw(self, rows: Rows, path: Path) -> None:
        """Write the picture.

        Raises:
            ImportError: matplotlib is not installed.
        """
        shown = self.select(rows)
        figure = new_figure("the benchmarks' figure", *self.size)
        self.paint(figure, shown)
        last = max(shown, key=lambda row: row["date"])
        figure.suptitle(f"{self.title}\n{stamp(last)}", fontsize=9)
        save_figure(figure, path, dpi=130)


def _of_newest_gpu(rows: Sequence[Row]) -> list[Row]:
    """Of the GPU measured last, the newest of each measurement."""
    gpus = sorted(filter(on_gpu, rows), key=lambda row: row["date"])
    return [row for row in gpus if row["device"] == gpus[-1]["device"]]


def _losses(rows: Rows) -> list[Row]:
    found = []
    for name, _, sets in LOSSES:
        case = asdict(sets["headline"][0])
        del case["pairs"]
        found += [{**row, "benchmark": name} for row in rows(name) if matches(row, case)]
    return _of_newest_gpu(found)


def _paint_losses(figure: Any, rows: Sequence[Row]) -> None:
    """Lines over N; a cross at the upper edge is an N at which a provider failed."""
    axes = figure.subplots(len(MEASURED), len(LOSSES), sharex=True, squeeze=False)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    for column, (name, title, _) in enumerate(LOSSES):
        axes[0, column].set_title(title, fontsize=9)
        axes[-1, column].set_xlabel("pairs N", fontsize=8)
        for axis, (cell, label, times) in zip(axes[:, column], MEASURED, strict=True):
            for number, provider in enumerate(providers):
                own = {
                    int(row["pairs"]): row
                    for row in rows
                    if (row["benchmark"], row["provider"]) == (name, provider)
                }
                measured = sorted(n for n, row in own.items() if row[cell])
                values = [times * float(own[n][cell]) for n in measured]
                colour, width = f"C{number % 10}", 2.5 if provider == OURS else 1.0
                axis.plot(measured, values, ".-", color=colour, linewidth=width, label=provider)
                failed = sorted(n for n, row in own.items() if row["error"])
                edge = axis.get_xaxis_transform()
                axis.plot(failed, [0.98] * len(failed), "x", color=colour, transform=edge)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylabel(label, fontsize=8)
            axis.grid(visible=True, alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _steps(rows: Rows) -> list[Row]:
    cases = [asdict(StepCase(model, batch)) for model, batch in FITTING.items()]
    return _of_newest_gpu(
        [
            row
            for row in rows("step")
            if row["median_ms"]
            and row["provider"] in STEPS
            and any(matches(row, case) for case in cases)
        ]
    )


def _paint_steps(figure: Any, rows: Sequence[Row]) -> None:
    axes = figure.subplots(1, len(FITTING), squeeze=False)[0]
    for axis, (model, batch) in zip(axes, FITTING.items(), strict=True):
        rates = {
            row["provider"]: 1e3 * batch / float(row["median_ms"])
            for row in rows
            if row["model"] == model
        }
        for number, provider in enumerate(STEPS):
            bars = axis.bar(number, rates.get(provider, 0.0), color=f"C{number}", label=provider)
            shown = f"{rates[provider]:,.0f}" if provider in rates else "–"
            axis.bar_label(bars, [shown], fontsize=8)
        axis.set_title(f"{model}, {batch:,} pairs a step", fontsize=9)
        axis.set_xticks([])
        axis.margins(y=0.15)
    axes[0].set_ylabel("pairs a second", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


FIGURES = (
    BenchmarkFigure(
        "Time and memory of the losses over N", "losses.png", _losses, _paint_losses, (9, 7)
    ),
    BenchmarkFigure(
        "Training steps, captions as the web's", "steps.png", _steps, _paint_steps, (9, 3.6)
    ),
)
