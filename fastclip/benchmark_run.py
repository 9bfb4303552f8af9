"""``fastclip eval --datasets``: a trained model on data sets, and the results as files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastclip.data.rewriting import check_target, write_text
from fastclip.distributed.runtime import initialise, shutdown
from fastclip.eval.benchmark import Protocol, Row, run_benchmark
from fastclip.eval.benchmark_table import format_rows, summary
from fastclip.eval.datasets import nearest, paper_results
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.few_shot import equal_shots
from fastclip.eval.layout import find_datasets
from fastclip.eval.suite import EvalConfig
from fastclip.evaluate import load_trained, run_config, run_folder
from fastclip.models.config import ClipConfig
from fastclip.models.presets import PRESETS
from fastclip.printing import printable_lines
from fastclip.provenance import provenance
from fastclip.report.few_shot_figure import FewShotCurve, draw_few_shot
from fastclip.tokenizer import Tokenizer

FORMAT = "fastclip benchmark 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured, of which model."""

    checkpoint: Path
    preset: str | None
    """The paper's model beside it."""

    same_scale: bool
    """Whether the two have one architecture."""

    protocol: Protocol
    rows: list[Row]
    is_main: bool
    """Whether this is the rank that tells."""

    @property
    def failed(self) -> bool:
        """Whether anything that was asked for could not be done."""
        return any(row.failures for row in self.rows)

    def table(self) -> str:
        """The results, a row for each data set, and their summary."""
        return printable_lines(f"{format_rows(self.rows, self.preset)}\n\n{summary(self.rows)}")

    def draw_few_shot(self, path: Path) -> None:
        """Draw the data sets that have few-shot values beside their zero-shot ones.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is none, or the path is neither .png nor .svg.
        """
        curves = [
            FewShotCurve(
                name=row.title,
                zero_shot=row.zero_shot.value,
                shots={k: (one.mean, one.low, one.high) for k, one in row.few_shot.items()},
                equal_shots=equal_shots(row.zero_shot.value, row.few_shot),
            )
            for row in self.rows
            if row.zero_shot is not None and row.few_shot
        ]
        draw_few_shot(curves, path)

    def write_json(self, path: Path) -> None:
        """Write the results, in one step.

        An object: ``format``; ``checkpoint``, its path; ``preset``, the paper's model or null, and
        ``same_scale``; ``protocol``, the fields of `Protocol`; ``rows``, for each data set the
        fields of `Row`, where ``zero_shot`` is null or {value, low, high}, ``linear_probe`` null or
        {value, strength, searched, …}, ``few_shot`` null or {shots: {mean, low, high, …}},
        ``paper`` null or {zero_shot, linear_probe}, ``retrieval`` null or {captions: {recall: …}},
        and ``comparable``: whether the paper's zero-shot number or recalls are of the same data and
        architecture; and ``provenance``: commit, date, machine, versions. Measures are fractions.
        """
        content = {
            "format": FORMAT,
            "checkpoint": str(self.checkpoint),
            "preset": self.preset,
            "same_scale": self.same_scale,
            "protocol": dataclasses.asdict(self.protocol),
            "rows": [dataclasses.asdict(row) | {"comparable": row.comparable} for row in self.rows],
            "provenance": provenance(),
        }
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        check_target(path)
        write_text(path, text)


def evaluate_datasets(
    path: Path,
    root: Path,
    *,
    only: Sequence[str] | None = None,
    protocol: Protocol,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    results: Path | None = None,
) -> Benchmark:
    """Measure a run's or a checkpoint's model on the data sets below `root`.

    Works alone or under a launcher. A data set that fails does not stop the others.

    Args:
        only: names of data sets; None for all.
        preset: the paper's model to set beside; None: the one of the same architecture, if any.
        overrides: of the run's config, e.g. ``eval.batch_size=512``.
        results: file to write after each data set (see `Benchmark.write_json`), so that one that is
            stopped leaves what it has measured.

    Raises:
        FileNotFoundError: there is no checkpoint, no such folder, or no data set in it.
        ValueError: the preset is none of the paper's, or an override does not fit.
    """
    if preset is not None and preset not in paper_results():
        raise ValueError(
            f"preset is one of the paper's models, {', '.join(paper_results())}, not "
            f"{preset!r}{nearest(preset, paper_results())}"
        )
    names = find_datasets(root, only)
    settings, apply_orientation = _settings(path, overrides)
    runtime = initialise(device)
    try:
        model, checkpoint = load_trained(path)
        preset = preset or _architecture(model.config)
        same_scale = preset is not None and _scale(model.config) == _scale(PRESETS[preset])
        evaluator = Evaluator(
            model=model.to(runtime.device),
            tokenizer=Tokenizer(context_length=model.config.text.context_length),
            runtime=runtime,
            batch_size=settings.batch_size,
            workers=settings.workers,
            apply_orientation=apply_orientation,
        )
        found = Benchmark(
            checkpoint=checkpoint,
            preset=preset,
            same_scale=same_scale,
            protocol=protocol,
            rows=[],
            is_main=runtime.is_main,
        )

        def keep(rows: list[Row]) -> None:
            found.rows[:] = rows
            if results is not None and found.is_main:
                found.write_json(results)

        run_benchmark(
            evaluator, root, names=names, protocol=protocol, preset=preset, same_scale=same_scale,
            measured=keep,
        )  # fmt: skip
        return found
    finally:
        shutdown()


def _settings(path: Path, overrides: Sequence[str]) -> tuple[EvalConfig, bool]:
    """How the run evaluates, and whether it turns images as EXIF says; the defaults without run."""
    try:
        folder = run_folder(path)
    except FileNotFoundError:
        if overrides:
            raise
        return EvalConfig(), False
    config = run_config(folder, overrides)
    return config.eval, config.data.apply_orientation


def _architecture(config: ClipConfig) -> str | None:
    """The paper's model that this is one of."""
    found = [name for name in paper_results() if _scale(PRESETS[name]) == _scale(config)]
    return found[0] if found else None


def _scale(config: ClipConfig) -> tuple[Any, ...]:
    """What makes a model as large as another: the sizes of its towers."""
    text = config.text
    vision = dataclasses.asdict(config.vision)
    vision.pop("activation", None)
    return (
        type(config.vision).__name__,
        tuple(sorted(vision.items())),
        (text.width, text.layers, text.heads),
        config.embed_dim,
    )
