"""The scaling experiment: train a family, fit its errors over compute, predict the largest.

arXiv 2103.00020, Figure 9, has the mean zero-shot error of five ResNets on a line over 44 times of
compute, on logarithmic axes. Compute is that of both towers, forward and backward, as they are
executed (`fastclip.flops`), times the images of a training; the loss is not counted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastclip.config import TrainConfig
from fastclip.data.rewriting import write_text
from fastclip.eval.table import columns
from fastclip.experiments.scaling_family import Member, member_config, text_lengths
from fastclip.experiments.scaling_fit import (
    FEWEST_FOR_FLOOR,
    HeldOut,
    PowerLaw,
    Saturating,
    fit_power_law,
    fit_saturating,
    predict_largest,
)
from fastclip.experiments.scaling_groups import GroupTask
from fastclip.experiments.scaling_runs import Training, held, train_once
from fastclip.flops import executed_flops_per_sample
from fastclip.metrics import duration
from fastclip.models.clip import Clip
from fastclip.provenance import launch_commits, provenance
from fastclip.report.scaling_figure import Curve, Point, Prediction, draw_scaling

logger = logging.getLogger("fastclip")

_SAME = 1.96
"""Standard deviations of a normal distribution that hold 95 %."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model of the family, trained once per seed."""

    member: Member
    parameters: int
    flops_per_image: float
    """Of an image and its caption, forward and backward."""
    images: int
    """That each training saw."""
    learning_rate: float
    trainings: tuple[Training, ...]
    shared: tuple[tuple[str, ...], ...]
    """Tasks by the test images that they share."""

    @property
    def flops(self) -> float:
        """Of one training."""
        return self.flops_per_image * self.images

    @property
    def error(self) -> float:
        """Mean over seeds and tasks."""
        return sum(training.mean_error for training in self.trainings) / len(self.trainings)

    @property
    def task_errors(self) -> dict[str, float]:
        """Mean over seeds, of each task."""
        count = len(self.trainings)
        names = self.trainings[0].errors
        return {name: sum(t.errors[name] for t in self.trainings) / count for name in names}

    @property
    def binomial_deviation(self) -> float:
        """Standard deviation of `error` over other test images of the same kind.

        Each task's is binomial. Tasks on the same images are taken as wholly correlated, others as
        independent, and seeds, which share all of them, make it no smaller.
        """
        errors, images = self.task_errors, self.trainings[0].test_images
        deviations = {
            name: math.sqrt(error * (1 - error) / images[name]) for name, error in errors.items()
        }
        groups = [sum(deviations[name] for name in names) for names in self.shared]
        return math.sqrt(sum(group**2 for group in groups)) / len(errors)

    @property
    def binomial_interval(self) -> tuple[float, float]:
        """95 %, by the normal approximation, within [0, 1]."""
        reach = _SAME * self.binomial_deviation
        return max(0.0, self.error - reach), min(1.0, self.error + reach)


@dataclass(frozen=True, kw_only=True)
class Fits:
    """What the errors say about scaling."""

    line: PowerLaw
    held_out: HeldOut
    floor: Saturating | None
    """None with too few models to ask."""


def run_scaling(
    members: Sequence[Member],
    base: TrainConfig,
    out: Path,
    *,
    images: int,
    groups: GroupTask | None = None,
) -> tuple[list[Measured], Fits]:
    """Train and evaluate every member, then fit.

    `out` gets ``scaling.json``, ``.txt``, ``.png`` and ``.svg``, and the runs.
    A training that has ended is not done again, and one that was cut off goes on from its newest
    checkpoint. The measurements are written before they are fitted.

    Args:
        base: data, tasks, optimiser and batch that all share; see `member_config`.
        images: that each model sees in one training.
        groups: a task beside those of `base`.

    Raises:
        ValueError: too few models for a fit, no error to fit, or see `train_once`.
        OSError: see `held` and `train_once`.
        ImportError: SciPy or matplotlib is not installed.
    """
    if len(members) < 4:
        raise ValueError(
            f"a fit without the largest model needs at least 4 models, not {len(members)}"
        )
    if not base.eval.zero_shot:
        raise ValueError("the scaling experiment needs a zero-shot task to measure errors with")
    with held(out) as lock:
        lengths = text_lengths(base)
        measured = [
            _measure(member, base, out, groups, images=images, lengths=lengths, lock=lock)
            for member in members
        ]
        measured.sort(key=lambda one: one.flops)
        _save(out, measured, None)
        fits = fit(measured)
        _save(out, measured, fits)
        write_text(out / "scaling.txt", format_report(measured, fits) + "\n")
        for path in (out / "scaling.png", out / "scaling.svg"):
            _draw(measured, fits, path)
    return measured, fits


def fit(measured: Sequence[Measured]) -> Fits:
    """The line through the models' mean errors, and what the smaller ones predict.

    Raises:
        ValueError: see `fit_power_law` and `predict_largest`.
    """
    flops, errors = [one.flops for one in measured], [one.error for one in measured]
    return Fits(
        line=fit_power_law(flops, errors),
        held_out=predict_largest(flops, errors),
        floor=fit_saturating(flops, errors) if len(flops) >= FEWEST_FOR_FLOOR else None,
    )


def _measure(
    member: Member,
    base: TrainConfig,
    out: Path,
    groups: GroupTask | None,
    *,
    images: int,
    lengths: Sequence[int],
    lock: int,
) -> Measured:
    trainings = []
    for seed in range(member.seeds):
        config = member_config(
            base, member, seed, images=images, directory=out / f"{member.name}-seed{seed}"
        )
        logger.info("%s, seed %d: %s steps", member.name, seed, f"{config.run.steps:,}")
        training = train_once(config, groups, lock)
        logger.info("  error %.4f, %s", training.mean_error, duration(training.seconds))
        trainings.append(training)
    shared: dict[str, list[str]] = {}
    for task in [*base.eval.zero_shot, *([] if groups is None else [groups])]:
        shared.setdefault(task.shards, []).append(task.name)
    config = member_config(base, member, 0, images=images, directory=out)
    assert config.run.steps is not None
    return Measured(
        member=member,
        parameters=sum(p.numel() for p in Clip(member.model).parameters()),
        flops_per_image=executed_flops_per_sample(
            member.model,
            lengths,
            last_row=base.attention.last_row,
            patch_dropout=base.run.patch_dropout,
        ),
        images=config.run.steps * config.run.global_batch_size,
        learning_rate=config.optim.learning_rate,
        trainings=tuple(trainings),
        shared=tuple(tuple(names) for names in shared.values()),
    )


def _save(out: Path, measured: Sequence[Measured], fits: Fits | None) -> None:
    content: dict[str, Any] = {
        "scaled": describe(measured),
        "compute_span": measured[-1].flops / measured[0].flops,
        "models": [_model(one) for one in measured],
        "provenance": provenance(),
        "trained_at": launch_commits(
            out / f"{one.member.name}-seed{training.seed}"
            for one in measured
            for training in one.trainings
        ),
    }
    if fits is not None:
        content["fit"] = dataclasses.asdict(fits.line)
        content["fit"]["falls"] = fits.line.falls
        content["largest_held_out"] = dataclasses.asdict(fits.held_out)
        content["largest_held_out"]["inside"] = fits.held_out.inside
        content["saturating"] = None
        if fits.floor is not None:
            supported = {"supported": fits.floor.supported}
            content["saturating"] = dataclasses.asdict(fits.floor) | supported
    write_text(out / "scaling.json", json.dumps(content, indent=2) + "\n")


def _model(one: Measured) -> dict[str, Any]:
    return {
        "name": one.member.name,
        "model": dataclasses.asdict(one.member.model),
        "parameters": one.parameters,
        "flops_per_image": one.flops_per_image,
        "images": one.images,
        "flops": one.flops,
        "learning_rate": one.learning_rate,
        "mean_error": one.error,
        "task_errors": one.task_errors,
        "binomial_interval": one.binomial_interval,
        "trainings": [dataclasses.asdict(t) | {"mean_error": t.mean_error} for t in one.trainings],
    }


def describe(measured: Sequence[Measured]) -> str:
    """What grows from the smallest model to the largest, and what does not."""
    models = (measured[0].member.model, measured[-1].member.model)
    parts = [
        ("image tower's width", [m.vision.width for m in models]),
        ("its blocks", [_blocks(m.vision.layers) for m in models]),
        ("its resolution", [m.vision.image_size for m in models]),
        ("text tower's width", [m.text.width for m in models]),
        ("its layers", [m.text.layers for m in models]),
        ("images", [measured[0].images, measured[-1].images]),
    ]
    return "; ".join(
        f"{name} {low:,} to {high:,}" if low != high else f"{name} {low:,} throughout"
        for name, (low, high) in parts
    )


def _blocks(layers: int | tuple[int, ...]) -> int:
    return layers if isinstance(layers, int) else sum(layers)


def format_report(measured: Sequence[Measured], fits: Fits) -> str:
    """What the models cost and what they reach, as two tables; then the fits, in sentences."""
    tasks = list(measured[0].task_errors)
    recalls = [name for name in measured[0].trainings[0].retrieval if name.endswith("_r1")]
    short = [
        name.replace("/image_to_text_r1", ", text R@1").replace("/text_to_image_r1", ", image R@1")
        for name in recalls
    ]
    costs = [["model", "params", "MFLOP/image", "images", "TFLOP", "rate", "seeds", "seconds"]]
    results = [["model", *tasks, "mean error", "seeds' s.d.", "95 % of images", *short]]
    for one in measured:
        name, runs = one.member.name, one.trainings
        spread = f"{np.std([t.mean_error for t in runs], ddof=1):.2%}" if len(runs) > 1 else "-"
        low, high = one.binomial_interval
        costs.append(
            [
                name,
                f"{one.parameters / 1e6:.2f} M",
                f"{one.flops_per_image / 1e6:,.1f}",
                f"{one.images:,}",
                f"{one.flops / 1e12:,.2f}",
                f"{one.learning_rate:.2e}",
                str(len(runs)),
                f"{np.mean([t.seconds for t in runs]):,.0f}",
            ]
        )
        results.append(
            [
                name,
                *(f"{error:.2%}" for error in one.task_errors.values()),
                f"{one.error:.2%}",
                spread,
                f"{low:.2%} to {high:.2%}",
                *(f"{np.mean([t.retrieval[name] for t in runs]):.2%}" for name in recalls),
            ]
        )
    return "\n\n".join([columns(costs), columns(results), "\n".join(_sentences(measured, fits))])


def _sentences(measured: Sequence[Measured], fits: Fits) -> list[str]:
    line, out = fits.line, fits.held_out
    span = measured[-1].flops / measured[0].flops
    sentences = [
        f"Scaled over {span:.1f} times of compute: {describe(measured)}.",
        f"log(error) = a - b log(FLOP): b = {line.exponent:.4f} (standard error "
        f"{line.exponent_error:.4f}), a = {line.intercept:.3f} ({line.intercept_error:.3f}), "
        f"R² = {line.r_squared:.4f}, "
        f"residuals' deviation {line.deviation:.4f}, {len(measured)} models.",
        f"Without {measured[-1].member.name} the others predict {out.predicted:.2%} "
        f"(95 %: {out.low:.2%} to {out.high:.2%}); measured are {out.measured:.2%}: "
        f"{'inside' if out.inside else 'outside'}.",
    ]
    if not line.falls:
        sentences.append(
            "Errors do not fall with compute here (the 95 % interval of b is not above 0): train "
            "on more images before anything is read from the line."
        )
    if fits.floor is None:
        sentences.append(
            f"A floor of the error needs {FEWEST_FOR_FLOOR} models or more to be asked about."
        )
    else:
        floor = fits.floor
        verdict = "is supported" if floor.supported else "is not supported"
        sentences.append(
            f"A floor {verdict} (AICc {floor.aicc:.1f} with one of {floor.floor:.2%}, "
            f"{floor.power_law_aicc:.1f} without)."
        )
    return sentences


def _draw(measured: Sequence[Measured], fits: Fits, path: Path) -> None:
    low, high = measured[0].flops / 1.5, measured[-1].flops * 1.5
    grid = np.geomspace(low, high, 200)
    band = fits.line.confidence_band(grid)
    out = fits.held_out
    draw_scaling(
        [
            Point(
                name=one.member.name,
                flops=one.flops,
                error=one.error,
                interval=one.binomial_interval,
                seeds=tuple(t.mean_error for t in one.trainings),
                tasks=one.task_errors,
            )
            for one in measured
        ],
        Curve(
            flops=grid.tolist(),
            error=fits.line.error(grid).tolist(),
            low=band[0].tolist(),
            high=band[1].tolist(),
            residuals=fits.line.residuals,
            label=f"error ∝ FLOP$^{{{-fits.line.exponent:.3f}}}$, R² = {fits.line.r_squared:.3f}",
        ),
        Prediction(flops=out.flops, error=out.predicted, low=out.low, high=out.high),
        path,
    )
