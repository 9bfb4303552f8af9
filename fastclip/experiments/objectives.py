"""How efficiently five objectives learn zero-shot classification (arXiv 2103.00020, Figure 2).

All see one stream of data, through one image tower: that of the demo. See `objective_models` for
the objectives, `objective_scoring` for how each classifies (fixed in advance), `objective_training`
for the runs. The number that counts is the accuracy on drawings of a style that training has never
shown, among 1,919 names of emoji; each objective trains at the learning rate that a search on
another seed and another unseen style has found for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastclip.config import TrainConfig
    from fastclip.experiments.objective_models import Objective
    from fastclip.experiments.objective_training import RunSettings

logger = logging.getLogger("fastclip")

HEADLINE = "fluent-emoji-flat"
TASKS = (HEADLINE, "flagpack", "digits")
SEARCH_TASK = "fxemoji"
SEARCH_SEED = 1000
LEARNING_RATES = (1e-3, 2e-3, 4e-3)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much is trained."""

    seeds: int
    evaluate_at: tuple[int, ...]
    """Steps; spaced geometrically, the last ends a run."""

    search_steps: int
    """Length of the search's runs, three for each objective; 0 takes the middle rate for all."""


PRESETS = {
    "small": Preset(seeds=1, evaluate_at=(32, 45, 64, 91, 128), search_steps=0),
    "long": Preset(seeds=3, evaluate_at=(32, 45, 64, 91, 128, 181, 256, 362, 512), search_steps=96),
}
"""At 256 pairs a step: a quarter of an hour, and an hour, on two CPU cores."""


def add_objectives_verb(subparsers: Any) -> None:
    """Add ``objectives``; `subparsers` is what argparse's `add_subparsers` gives."""
    verb = subparsers.add_parser(
        "objectives", help="compare five objectives on one stream of data (the paper's Figure 2)"
    )
    verb.add_argument("--data", type=Path, required=True, help="what `fastclip data demo` wrote")
    verb.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    verb.add_argument("--preset", choices=tuple(PRESETS), default="small")
    verb.add_argument("--seeds", type=int, help="other than the preset's 1 (small) or 3 (long)")
    verb.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    verb.set_defaults(run=_objectives)


def _objectives(options: argparse.Namespace) -> int:
    from fastclip.recipes.demo import demo

    preset = PRESETS[options.preset]
    if options.seeds is not None:
        preset = dataclasses.replace(preset, seeds=options.seeds)
    print(run_objectives(demo(str(options.data)), options.out, preset, jobs=options.jobs))
    return 0


def run_objectives(config: TrainConfig, out: Path, preset: Preset, *, jobs: int) -> str:
    """Do what is left of the experiment: runs that are finished in `out` are not repeated.

    Args:
        config: the demo's, or one with tasks of the same names.
        out: gets ``search/`` and ``runs/`` with a folder for each run, ``objectives.json``,
            ``.txt``, ``.png`` and ``.svg``.
        jobs: runs at a time; the numbers do not depend on it.

    Returns:
        The tables, as text.

    Raises:
        ValueError: `out` holds runs of other settings or data; or a setting is out of range.
        FloatingPointError: a run diverged, other than in the search.
        ImportError: matplotlib or SciPy is not installed.
    """
    from fastclip.data.rewriting import write_text
    from fastclip.experiments.objective_models import OBJECTIVES
    from fastclip.experiments.objective_results import format_results
    from fastclip.experiments.objective_training import RunSettings

    if preset.seeds < 1 or jobs < 1:
        raise ValueError(f"--seeds={preset.seeds} and --jobs={jobs} are at least 1")
    _check(config)
    begin = time.time()
    out.mkdir(parents=True, exist_ok=True)
    rates, search = choose_learning_rates(config, out / "search", preset, jobs)
    wanted = {
        f"{objective}-seed{seed}": RunSettings(
            objective=objective,
            seed=seed,
            learning_rate=rates[objective],
            evaluate_at=preset.evaluate_at,
            tasks=TASKS,
            variants=True,
        )
        for seed in range(preset.seeds)
        for objective in OBJECTIVES
    }
    done = _train_all(wanted, config, out / "runs", jobs, may_diverge=False)
    runs: dict[Objective, list[Any]] = {
        objective: [done[f"{objective}-seed{seed}"] for seed in range(preset.seeds)]
        for objective in OBJECTIVES
    }
    _write(config, out, preset, runs, rates, search)
    text = format_results(runs, TASKS, HEADLINE)
    write_text(out / "objectives.txt", text + "\n")
    logger.info("%s holds the results; this took %.0f min", out, (time.time() - begin) / 60)
    return text


def choose_learning_rates(
    config: TrainConfig, folder: Path, preset: Preset, jobs: int
) -> tuple[dict[Objective, float], list[dict[str, Any]]]:
    """The best of `LEARNING_RATES` for each objective, and what each gave.

    Best is the highest top-5 accuracy on an unseen style that is not among the tasks reported, by a
    seed that is not, after a short run; top-1 decides ties. A rate that diverges is never best.
    """
    from fastclip.experiments.objective_models import OBJECTIVES
    from fastclip.experiments.objective_training import RunSettings

    if not preset.search_steps:
        return dict.fromkeys(OBJECTIVES, LEARNING_RATES[1]), []
    wanted = {
        f"{objective}-lr{rate:g}": RunSettings(
            objective=objective,
            seed=SEARCH_SEED,
            learning_rate=rate,
            evaluate_at=(preset.search_steps,),
            tasks=(SEARCH_TASK,),
            variants=False,
        )
        for objective in OBJECTIVES
        for rate in LEARNING_RATES
    }
    done = _train_all(wanted, config, folder, jobs, may_diverge=True)
    found = []
    for name, settings in wanted.items():
        rows = done[name]
        top5, top1 = (rows[-1][f"{SEARCH_TASK}/top{n}"] if rows else -1.0 for n in (5, 1))
        found.append(
            {
                "objective": settings.objective,
                "learning_rate": settings.learning_rate,
                "top5": top5,
                "top1": top1,
                "loss": rows[-1]["loss"] if rows else None,
            }
        )
    rates: dict[Objective, float] = {}
    for objective in OBJECTIVES:
        own = [row for row in found if row["objective"] == objective]
        best = max(own, key=lambda row: (row["top5"], row["top1"]))
        if best["top5"] < 0:
            raise FloatingPointError(f"{objective} diverges at all of {LEARNING_RATES}")
        rates[objective] = best["learning_rate"]
        logger.info("%s trains at learning rate %g", objective, rates[objective])
    return rates, found


def _train_all(
    wanted: Mapping[str, RunSettings],
    config: TrainConfig,
    folder: Path,
    jobs: int,
    *,
    may_diverge: bool,
) -> dict[str, list[dict[str, Any]]]:
    """Results of all runs by name; [] for one that diverged, where that may be."""
    from fastclip.experiments.objective_training import finished_results

    done = {
        name: finished_results(settings, config, folder / name) for name, settings in wanted.items()
    }
    left = {name: settings for name, settings in wanted.items() if done[name] is None}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin_worker) as pool:
        futures = {
            name: pool.submit(_train_one, settings, config, folder / name, may_diverge)
            for name, settings in left.items()
        }
        try:
            trained = {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: trained[name] if rows is None else rows for name, rows in done.items()}


def _begin_worker() -> None:
    """One thread: the runs share the processor, and their sums keep their order."""
    import torch

    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)


def _train_one(
    settings: RunSettings, config: TrainConfig, folder: Path, may_diverge: bool
) -> list[dict[str, Any]]:
    from fastclip.experiments.objective_training import train_objective

    try:
        return train_objective(settings, config, folder)
    except FloatingPointError as error:
        if not may_diverge:
            raise
        logger.warning("%s", error)
        return []


def _check(config: TrainConfig) -> None:
    """Raise ValueError unless the config has the tasks, and positives by label or caption."""
    missing = {*TASKS, SEARCH_TASK} - {task.name for task in config.eval.zero_shot}
    if missing:
        raise ValueError(f"eval.zero_shot lacks {', '.join(sorted(missing))}, as the demo has them")
    if config.data.positives == "none":
        raise ValueError("data.positives is label or caption here: captions repeat in a batch")


def _write(
    config: TrainConfig,
    out: Path,
    preset: Preset,
    runs: Mapping[Objective, Sequence[Any]],
    rates: Mapping[Objective, float],
    search: Sequence[Mapping[str, Any]],
) -> None:
    from fastclip.config import to_dict
    from fastclip.data.rewriting import write_text
    from fastclip.eval.zero_shot import load_classes
    from fastclip.experiments.objective_results import TITLES, curve, ratios, sensitivity
    from fastclip.provenance import launch_commits, provenance
    from fastclip.report.objectives_figure import draw_objectives

    results = {
        "preset": dataclasses.asdict(preset),
        "learning_rates": dict(rates),
        "learning_rate_search": list(search),
        "headline": f"{HEADLINE}/top1",
        "ratios": ratios(runs, HEADLINE),
        "ratios_by_other_scores": sensitivity(runs, HEADLINE),
        "runs": {objective: list(seeds) for objective, seeds in runs.items()},
        "config": to_dict(config),
        "provenance": provenance(),
        "trained_at": launch_commits(
            out / "runs" / f"{objective}-seed{seed}"
            for objective in runs
            for seed in range(preset.seeds)
        ),
    }
    write_text(out / "objectives.json", json.dumps(results, indent=1) + "\n")
    panels, chance = {}, {}
    for task in (task for name in TASKS for task in config.eval.zero_shot if task.name == name):
        classes = len(load_classes(task.classes).names)
        title = f"{task.name}, {classes:,} classes"
        measure = f"{task.name}/top1"
        panels[title] = {name: curve(runs[key], measure) for key, name in TITLES.items()}
        chance[title] = 1 / classes
    for ending in ("png", "svg"):
        draw_objectives(panels, chance, out / f"objectives.{ending}")
