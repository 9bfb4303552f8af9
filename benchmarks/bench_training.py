"""Whole trainings, ours beside open_clip's own trainer: ``python -m benchmarks.bench_training``.

Both read the same shards and have the same model, batch, steps, rate, schedule, decay, clipping and
areas of crops; each draws its own initial weights, order and crops. The recipe's pairs of one label
count as positives of each other; since they have one caption, the loss is that of open_clip all the
same. Rates leave out a run's first tenth (compilation, the first batches). The weights at the end
go through one evaluation, ours, on drawing styles that no training has seen.
``fastclip-equal-time`` trains as many whole epochs as fit into the time that open_clip took.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch

from benchmarks import record, training_peers
from benchmarks.harness import RESUME, alive, finish, one_line, watch
from benchmarks.training_peers import PROVIDERS, Provider, Training, skipped_steps
from fastclip.config import apply_overrides
from fastclip.data.index import index_shards
from fastclip.distributed.runtime import Runtime
from fastclip.eval.suite import run_suite
from fastclip.eval.table import columns
from fastclip.evaluate import load_trained, make_evaluator
from fastclip.models.clip import Clip
from fastclip.models.interop import load_weights
from fastclip.models.presets import PRESETS
from fastclip.recipes import RECIPES

RECIPE = "gpu_demo"
OWN_MODEL = "ViT-S-8"
"""Name in rows of the recipe's own model."""

EQUALLED = ("fastclip", "open_clip")
"""Whose rates say how long ``fastclip-equal-time`` trains."""


@dataclass(frozen=True)
class Case:
    """What a row is about, beside its provider."""

    pairs: int
    """In the training shards."""

    model: str
    precision: str
    batch: int
    epochs: int
    """Passes over the pairs that were asked for; those with the same steps have the same."""

    learning_rate: float
    workers: int
    seed: int

    @property
    def steps(self) -> int:
        """For the epochs, rounded up to what open_clip's workers can share evenly."""
        batches = math.ceil(self.epochs * self.pairs / self.batch)
        return math.ceil(batches / self.workers) * self.workers


@dataclass(frozen=True)
class Preset:
    """Defaults of the command line."""

    model: str
    batches: tuple[int, ...]
    epochs: int
    seeds: int
    learning_rate: float


CASES = {
    "tiny": Preset("ViT-Nano-8", (16,), 3, 1, 5e-4),
    "gpu": Preset(OWN_MODEL, (1024, 8192), 30, 3, 1e-3),
}

KEY = ("commit", "dirty", "device", "provider", *Case.__dataclass_fields__)
COLUMNS = (
    *record.STAMP_COLUMNS, "provider", "version", *Case.__dataclass_fields__,
    "steps", "samples", "seconds", "first_seconds", "samples_per_second", "wait_share", "mfu",
    "memory_gib", "final_loss", "mean_accuracy", "accuracies", "error",
)  # fmt: skip
"""`samples` are all that were trained on. `seconds` and what is computed from it are of the steps
after the first tenth, which took `first_seconds`. `final_loss` is of the last batch. `accuracies`
is JSON, top-1 of each task; `mean_accuracy` their mean."""


def equal_time_steps(case: Case, ours: float, theirs: float) -> int:
    """Steps of the whole epochs that fit into the time of `case.steps` steps of theirs.

    Args:
        ours, theirs: samples per second.
    """
    epochs = case.steps * case.batch / case.pairs * ours / theirs
    return max(1, math.floor(max(1, math.floor(epochs)) * case.pairs / case.batch))


def prepare(case: Case, steps: int, data: Path, device: torch.device, folder: Path) -> Training:
    """The recipe with a case's numbers.

    Raises:
        ValueError: they do not fit the recipe, or each other.
    """
    if steps < 2:
        raise ValueError(f"{steps} step(s): the first is not timed, so give more epochs")
    native = importlib.util.find_spec("fastclip.tokenizer._native") is not None
    fields = [
        f"run.global_batch_size={case.batch}", f"run.steps={steps}", f"run.seed={case.seed}",
        f"run.device={device.type}", f"engine.precision={case.precision}",
        f"optim.learning_rate={case.learning_rate}", f"optim.warmup_steps={skipped_steps(steps)}",
        f"data.workers={case.workers}",
        f"data.tokenizer={'native' if native else 'python'}",
    ]  # fmt: skip
    if case.model != OWN_MODEL:
        fields.insert(0, f"model={case.model}")
    config = apply_overrides(RECIPES[RECIPE](str(data)), fields)
    return Training(config, tuple(fields), RECIPE, data, folder)


def measure(
    provider: Provider, case: Case, steps: int, data: Path, device: torch.device, log: Path,
    limit: float,
) -> dict[str, object]:  # fmt: skip
    """Train and evaluate; cells of a row, without the stamp; `error` where something failed.

    Args:
        steps: optimiser steps.
        data: folder that the recipe takes, absolute.
        log: file for the trainer's output.
        limit: seconds after which it is stopped.
    """
    cells: dict[str, object] = {"steps": steps, "samples": steps * case.batch}
    try:
        # What a stopped trainer's children still write must not hide why it was stopped.
        with tempfile.TemporaryDirectory(
            prefix="fastclip-training-", ignore_cleanup_errors=True
        ) as folder:
            training = prepare(case, steps, data, device, Path(folder))
            cells |= _train(provider, training, device, log, limit)
    except Exception as error:
        cells["error"] = f"{one_line(error)} (see {log})"
    return cells


def _train(
    provider: Provider, training: Training, device: torch.device, log: Path, limit: float
) -> dict[str, object]:
    config = training.config
    if provider.family == "open_clip":
        command = training_peers.open_clip_command(training, provider.extra)
        training_peers.run_logged(command, log, limit)
        figures = training_peers.open_clip_figures(training)
        model = Clip(config.model)
        checkpoint = training_peers.open_clip_checkpoint(training)
        model.load_state_dict(load_weights(checkpoint).state_dict)
    else:
        command = training_peers.fastclip_command(training, provider.extra)
        training_peers.run_logged(command, log, limit)
        figures = training_peers.fastclip_figures(training)
        model, _ = load_trained(training.folder)
    metrics = run_suite(make_evaluator(model, config, Runtime.alone(device)), config.eval)
    tasks = [task.name for task in config.eval.zero_shot]
    accuracies = {name: round(metrics[f"zero_shot/{name}/top1"], 6) for name in tasks}
    cells = asdict(figures)
    samples = cells.pop("steps") * config.run.global_batch_size
    return {
        **cells,
        "samples_per_second": samples / figures.seconds,
        "mean_accuracy": fmean(accuracies.values()),
        "accuracies": json.dumps(accuracies),
    }


def run(
    cases: Sequence[Case], providers: Sequence[Provider], rows: record.Record, stamp: record.Stamp,
    data: Path, device: torch.device, limit: float,
) -> int:  # fmt: skip
    """Measure what `rows` does not hold yet; the exit status. Logs lie beside the rows."""
    logs = rows.path.parent / "training"
    logs.mkdir(exist_ok=True)
    started = watch(rows)
    for case, provider in itertools.product(cases, providers):
        key = {**asdict(stamp), "provider": provider.name, **asdict(case)}
        if rows.has(key):
            continue
        steps = case.steps
        if provider.equal_time:
            ours, theirs = (_rate(rows, {**key, "provider": name}) for name in EQUALLED)
            if not ours or not theirs:
                print(f"{provider.name}: needs the rates of {' and '.join(EQUALLED)} before")
                continue
            steps = equal_time_steps(case, ours, theirs)
        row = {
            **stamp.columns(),
            **key,
            "version": record.version_of(training_peers.FULL_NAMES[provider.family]),
        }
        log = logs / ("-".join([provider.name, *map(str, astuple(case))]) + ".log")
        with started.during(row):
            cells = measure(provider, case, steps, data, device, log, limit)
            rows.write({**row, **cells})
        print(f"batch {case.batch}, seed {case.seed} | {provider.name}: {_said(cells)}")
        sys.stdout.flush()
        if not alive(device):
            print("the device is lost to that error; run the same command again to go on")
            return RESUME
    return 0


def _rate(rows: record.Record, key: Mapping[str, object]) -> float:
    """Samples per second in the row of this key, 0 where there are none."""
    return sum(float(row["samples_per_second"] or 0) for row in _rows_of(rows, key))


def _rows_of(rows: record.Record, values: Mapping[str, object]) -> list[dict[str, str]]:
    # As they are written.
    wanted = {
        name: f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
        for name, value in values.items()
    }
    return [row for row in rows.rows if all(row[name] == wanted[name] for name in wanted)]


def _said(cells: Mapping[str, object]) -> str:
    if "error" in cells:
        return str(cells["error"])
    return (
        f"{cells['steps']} steps, {cells['samples_per_second']:,.0f} samples/s, "
        f"waited {cells['wait_share']:.0%}, accuracy {cells['mean_accuracy']:.2%}"
    )


def table(
    rows: record.Record, stamp: record.Stamp, cases: Sequence[Case], peer: str = "open_clip"
) -> str:
    """Of each batch and provider: mean ± standard deviation over the seeds, beside `peer`'s mean.

    Rows with an error do not count; "" where no row is left.
    """
    heads = ["", "batch", "runs", "samples", "samples/s", f"× {peer}", "waited", "accuracy"]
    lines = [[*heads, "points more"]]
    for batch in dict.fromkeys(case.batch for case in cases):
        found: dict[str, list[dict[str, str]]] = {}
        for case in (case for case in cases if case.batch == batch):
            for row in _rows_of(rows, {**asdict(stamp), **asdict(case)}):
                if not row["error"]:
                    found.setdefault(row["provider"], []).append(row)

        def mean(provider: str, name: str, of: Mapping[str, list[dict[str, str]]] = found) -> float:
            values = [float(row[name]) for row in of.get(provider, ())]
            return fmean(values) if values else math.nan

        for name, theirs in found.items():
            ratio = mean(name, "samples_per_second") / mean(peer, "samples_per_second")
            gain = mean(name, "mean_accuracy") - mean(peer, "mean_accuracy")
            accuracy = _spread([100 * float(row["mean_accuracy"]) for row in theirs])
            lines.append(
                [
                    name,
                    str(batch),
                    str(len(theirs)),
                    f"{mean(name, 'samples'):,.0f}",
                    _spread([float(row["samples_per_second"]) for row in theirs]),
                    "–" if math.isnan(ratio) else f"{ratio:.2f}",
                    f"{mean(name, 'wait_share'):.0%}",
                    f"{accuracy} %",
                    "–" if math.isnan(gain) else f"{100 * gain:+.2f}",
                ]
            )
    return columns(lines) if len(lines) > 1 else ""


def _spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    digits = 0 if max(values) >= 1000 else 2
    shown = f"{fmean(values):,.{digits}f}"
    return f"{shown} ± {stdev(values):,.{digits}f}" if len(values) > 1 else shown


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    preset = CASES[options.cases or ("gpu" if device.type == "cuda" else "tiny")]
    data = options.data.resolve()
    chosen = options.providers or [each.name for each in PROVIDERS if each.by_default]
    try:
        stamp = record.stamp(options.commit, options.dirty, device)
        rows = record.Record(options.out / "training.csv", COLUMNS, KEY)
        config = RECIPES[RECIPE](str(data))
        pairs = len(index_shards(config.data.train, needs=("txt", "json")))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    cases = [
        Case(
            pairs=pairs,
            model=options.model or preset.model,
            precision="bf16" if device.type == "cuda" else "fp32",
            batch=batch,
            epochs=options.epochs or preset.epochs,
            learning_rate=options.learning_rate or preset.learning_rate,
            workers=options.workers or _workers(device),
            seed=seed,
        )
        for batch in options.batches or preset.batches
        for seed in range(options.seeds or preset.seeds)
    ]
    providers = [each for each in PROVIDERS if each.name in chosen and _usable(each)]
    status = run(cases, providers, rows, stamp, data, device, options.limit)
    print(table(rows, stamp, cases))
    return status


def _workers(device: torch.device) -> int:
    """For the loader, of either trainer; some cores are left to the trainer itself."""
    return max(1, min(14, (os.cpu_count() or 1) - 2)) if device.type == "cuda" else 1


def _usable(provider: Provider) -> bool:
    lacking = training_peers.missing() if provider.family == "open_clip" else []
    if lacking:
        print(f"{provider.name}: no {', '.join(lacking)} (pip install {training_peers.INSTALL})")
    return not lacking


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_training")
    add = parser.add_argument
    add("--cases", choices=list(CASES), help="defaults of what follows: gpu; on a CPU, tiny")
    add("--data", type=Path, default=record.ROOT / "demo/data", help="default: demo/data")
    add("--model", choices=[OWN_MODEL, *PRESETS], help=f"default: {OWN_MODEL}; of tiny, a smaller")
    add("--batches", type=_positive, nargs="+", help="pairs of a step")
    add("--epochs", type=_positive, help="passes over the pairs")
    add("--seeds", type=_positive, help="how many: 0, 1, …")
    add("--learning-rate", type=float, help="at its peak")
    add("--workers", type=_positive, help="of the loader: threads of ours, processes of theirs")
    names = [provider.name for provider in PROVIDERS]
    add("--providers", nargs="+", choices=names, help="default: the first four")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--limit", type=float, default=300.0, help="seconds for one training (default 300)")
    add("--out", type=Path, default=record.RESULTS, help="folder of the CSV file, and of logs")
    add("--commit", help="default: git's")
    add("--dirty", action="store_true", help="the files differ from the commit")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {text}")
    return number


if __name__ == "__main__":
    finish(main())
