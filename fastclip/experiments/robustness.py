"""``fastclip experiment robustness``: what models keep of their accuracy when the images change.

The models' accuracies under a shift are compared with those that the line through baselines
predicts from their accuracies without it, in logits: the difference is their effective robustness
(Taori et al., arXiv 2007.00644; arXiv 2103.00020, section 3.3).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastclip.config import TrainConfig
    from fastclip.distributed.runtime import Runtime
    from fastclip.eval.zero_shot import ZeroShotTask

logger = logging.getLogger("fastclip")

FEWEST_BASELINES = 3
"""Points through which a line says something."""


def add_robustness_verb(verbs: Any) -> None:
    """Add ``robustness``; `verbs` is what argparse's `add_subparsers` gives."""
    robustness = verbs.add_parser("robustness", help="accuracy under a shift of the images")
    robustness.add_argument(
        "paths",
        nargs="+",
        metavar="run",
        help="runs (all their checkpoints), checkpoints, eval.field=value (of the first one)",
    )
    robustness.add_argument(
        "--seen",
        required=True,
        metavar="TASK",
        help="zero-shot task of images like those trained on",
    )
    robustness.add_argument(
        "--unseen", required=True, metavar="TASK", help="zero-shot task of images that differ"
    )
    robustness.add_argument(
        "--baseline",
        action="append",
        type=Path,
        default=[],
        metavar="RUN",
        help="a run or checkpoint that the line is fitted to; default: all models",
    )
    robustness.add_argument(
        "--out", type=Path, default=Path("robustness"), help="folder of results"
    )
    robustness.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    robustness.set_defaults(run=_robustness, overrides=[])


def _robustness(options: argparse.Namespace) -> int:
    if options.seen == options.unseen:
        raise ValueError(f"--seen and --unseen are two tasks, not {options.seen} twice")
    given = [word for word in options.paths if "=" in word and not Path(word).exists()]
    result = run_robustness(
        [Path(word) for word in options.paths if word not in given],
        seen=options.seen,
        unseen=options.unseen,
        out=options.out,
        baselines=options.baseline,
        overrides=[*given, *options.overrides],
        device=options.device,
    )
    print(format_robustness(result))
    print(f"\n{options.out}: robustness.json, .txt and .png")
    return 0


@dataclass(frozen=True, kw_only=True)
class Count:
    """What a model classified right of a task's images."""

    right: int
    images: int

    @property
    def accuracy(self) -> float:
        return self.right / self.images


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model on both tasks."""

    checkpoint: str
    run: str
    baseline: bool
    seen: Count
    unseen: Count

    @property
    def fits(self) -> bool:
        """Whether both logits are finite."""
        return all(0 < count.right < count.images for count in (self.seen, self.unseen))


@dataclass(frozen=True, kw_only=True)
class Line:
    """logit(accuracy under shift) = slope · logit(accuracy) + intercept."""

    slope: float
    intercept: float
    r_squared: float
    points: int

    def __call__(self, accuracy: float) -> float:
        """Accuracy under shift of a model with this accuracy, which is between 0 and 1."""
        value = self.slope * math.log(accuracy / (1 - accuracy)) + self.intercept
        return 1 / (1 + math.exp(-min(max(value, -30.0), 30.0)))  # a steep line's is no other


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """All models, and the line of the baselines."""

    seen: str
    unseen: str
    models: list[Measured]
    line: Line | None
    note: str
    """What the line was fitted to, or why there is none."""

    def effective(self, model: Measured) -> float | None:
        """Accuracy under shift beyond what the line predicts; None where there is no prediction."""
        if self.line is None or not 0 < model.seen.right < model.seen.images:
            return None
        return model.unseen.accuracy - self.line(model.seen.accuracy)


def run_robustness(
    paths: Sequence[Path],
    *,
    seen: str,
    unseen: str,
    out: Path,
    baselines: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> Robustness:
    """Evaluate models on two tasks; write ``robustness.json``, ``.txt`` and ``.png`` into `out`.

    ``out/results`` keeps each model's counts, so that only new models are evaluated the next time.

    Args:
        paths: runs, of which all complete checkpoints are taken, and checkpoints.
        seen, unseen: names of zero-shot tasks in the first path's config, for all models.
        baselines: runs and checkpoints that the line is fitted to, evaluated as well; none: all.
        overrides: of the first path's config.

    Raises:
        FileNotFoundError, ValueError, OSError: there is no such run, task or shard; a launcher has
            started several ranks.
        ImportError: matplotlib or scipy is not installed.
    """
    from fastclip.data.rewriting import write_text
    from fastclip.distributed.runtime import initialise_alone, shutdown
    from fastclip.evaluate import run_config
    from fastclip.experiments.overlap import choose_tasks

    if not paths:
        raise ValueError("robustness needs at least one run or checkpoint")
    config = run_config(paths[0], overrides)
    tasks = choose_tasks(config, [seen, unseen])
    fitted = {found.resolve() for path in baselines for found in checkpoints_of(path)}
    found = [found for path in (*paths, *baselines) for found in checkpoints_of(path)]
    named: dict[Path, Path] = {}  # as results name them
    for path in found:
        named.setdefault(path.resolve(), path)
    (out / "results").mkdir(parents=True, exist_ok=True)
    runtime = initialise_alone(device, "this experiment")
    models = []
    try:
        for checkpoint, given in named.items():
            counts = _counts(checkpoint, tasks, config, runtime, out / "results")
            models.append(
                Measured(
                    checkpoint=str(given),
                    run=_run_name(checkpoint),
                    baseline=not fitted or checkpoint in fitted,
                    seen=counts[0],
                    unseen=counts[1],
                )
            )
    finally:
        shutdown()
    line, note = fit_line(models)
    result = Robustness(seen=seen, unseen=unseen, models=models, line=line, note=note)
    write_text(out / "robustness.json", json.dumps(_as_json(result), indent=1) + "\n")
    write_text(out / "robustness.txt", format_robustness(result) + "\n")
    _draw(result, out / "robustness.png")
    return result


def checkpoints_of(path: Path) -> list[Path]:
    """A run's complete checkpoints, the oldest first; or the checkpoint that `path` is.

    Raises:
        FileNotFoundError: it is neither.
    """
    from fastclip.checkpoint_folder import complete_checkpoints
    from fastclip.evaluate import find_checkpoint

    names = complete_checkpoints(path / "checkpoints")
    return [path / "checkpoints" / name for name in names] or [find_checkpoint(path)]


def _run_name(checkpoint: Path) -> str:
    """The run's folder, or the checkpoint's where it lies in none."""
    folder = checkpoint.parent
    return folder.parent.name if folder.name == "checkpoints" else checkpoint.name


def fit_line(models: Sequence[Measured]) -> tuple[Line | None, str]:
    """Least squares through the baselines' logits, and a line on what was done."""
    import numpy as np

    usable = [model for model in models if model.baseline and model.fits]
    left_out = sum(model.baseline for model in models) - len(usable)
    without = f"; {left_out} at 0 or 100 % left out" if left_out else ""
    if len(usable) < FEWEST_BASELINES:
        return None, (
            f"no line: {len(usable)} baseline(s) of the {FEWEST_BASELINES} that it needs{without}"
        )
    x, y = (
        np.array([math.log(count.right / (count.images - count.right)) for count in counts])
        for counts in ([m.seen for m in usable], [m.unseen for m in usable])
    )
    if np.ptp(x) == 0:
        return None, f"no line: the {len(usable)} baselines have one accuracy{without}"
    slope, intercept = np.polyfit(x, y, 1)
    residual, spread = y - slope * x - intercept, y - y.mean()
    total = float(spread @ spread)
    line = Line(
        slope=float(slope),
        intercept=float(intercept),
        r_squared=1 - float(residual @ residual) / total if total else 1.0,
        points=len(usable),
    )
    return line, f"line of {len(usable)} baselines, R² = {line.r_squared:.3f}{without}"


def _counts(
    checkpoint: Path,
    tasks: Sequence[ZeroShotTask],
    config: TrainConfig,
    runtime: Runtime,
    kept: Path,
) -> list[Count]:
    """The model's count on each task, computed once."""
    import torch

    from fastclip.data.rewriting import write_text
    from fastclip.eval.zero_shot import zero_shot
    from fastclip.evaluate import load_trained, make_evaluator

    weights = _digest(checkpoint)
    evaluator = None
    counts = []
    for task in tasks:
        path = kept / f"{_key(weights, task, config)}.json"
        if path.is_file():
            counts.append(_read_count(path))
            continue
        if evaluator is None:
            evaluator = make_evaluator(load_trained(checkpoint)[0], config, runtime)
        with torch.no_grad():
            numbers = zero_shot(evaluator, task)
        images = round(numbers["images"])
        count = Count(right=round(numbers["top1"] * images), images=images)
        write_text(path, json.dumps(asdict(count)))
        logger.info("%s on %s: %.2f %%", checkpoint, task.name, 100 * count.accuracy)
        counts.append(count)
    return counts


def _read_count(path: Path) -> Count:
    try:
        return Count(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it") from None


def _digest(checkpoint: Path) -> bytes:
    """Changes with the weights."""
    digest = hashlib.sha256()
    for name in ("model.json", "model.safetensors"):
        with (checkpoint / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def _key(weights: bytes, task: ZeroShotTask, config: TrainConfig) -> str:
    """Changes with the weights, the images, the classes and the texts."""
    from fastclip.data.index import METADATA_EXTENSION, index_shards

    index = index_shards(task.shards, needs=(METADATA_EXTENSION,))
    templates = task.templates if isinstance(task.templates, str) else list(task.templates)
    about = [index.hash, templates, config.data.apply_orientation]
    digest = hashlib.blake2b(weights, digest_size=16)
    digest.update(json.dumps(about).encode())
    digest.update(Path(task.classes).read_bytes())
    return digest.hexdigest()


def _as_json(result: Robustness) -> dict[str, Any]:
    from fastclip.provenance import provenance

    line = result.line
    rows = []
    for model in result.models:
        effective = result.effective(model)
        row = asdict(model)
        for name, count in (("seen", model.seen), ("unseen", model.unseen)):
            row[name] |= {"accuracy": count.accuracy, "interval": _interval(count)}
        rows.append(row | {"effective_robustness": effective})
    return {
        "seen": result.seen,
        "unseen": result.unseen,
        "line": None if line is None else asdict(line),
        "note": result.note,
        "models": rows,
        "provenance": provenance(),
    }


def _interval(count: Count) -> tuple[float, float]:
    from fastclip.eval.intervals import clopper_pearson

    return clopper_pearson(count.right, count.images)


def _draw(result: Robustness, path: Path) -> None:
    from fastclip.report.robustness_figure import Accuracy, RobustnessPoint, draw_robustness

    def accuracy(count: Count) -> Accuracy:
        return Accuracy(value=count.accuracy, interval=_interval(count))

    points = [
        RobustnessPoint(
            name=Path(model.checkpoint).name.removeprefix("step-").lstrip("0"),
            group=model.run,
            baseline=model.baseline,
            seen=accuracy(model.seen),
            unseen=accuracy(model.unseen),
        )
        for model in result.models
    ]
    draw_robustness(
        points, result.line, path, seen=result.seen, unseen=result.unseen, note=result.note
    )


def format_robustness(result: Robustness) -> str:
    """A table in per cent, and the line."""
    from fastclip.eval.table import columns

    rows = [("model", result.seen, result.unseen, "predicted", "effective robustness")]
    for model in result.models:
        effective = result.effective(model)
        predicted = "-" if effective is None else f"{model.unseen.accuracy - effective:.2%}"
        rows.append(
            (
                f"{model.run}/{Path(model.checkpoint).name}{' (baseline)' * model.baseline}",
                f"{model.seen.accuracy:.2%}",
                f"{model.unseen.accuracy:.2%}",
                predicted,
                "-" if effective is None else f"{100 * effective:+.2f}",
            )
        )
    return f"{columns(rows)}\n{result.note}"
