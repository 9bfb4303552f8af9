"""``fastclip experiment overlap``: were a run's evaluation images trained on, and does it matter?

(arXiv 2103.00020, section 5 and appendix C.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from fastclip.config import TrainConfig
    from fastclip.data.index import ShardIndex
    from fastclip.data.pixels import PixelReader
    from fastclip.eval.evaluator import Evaluator
    from fastclip.eval.overlap import Duplicates, DuplicateSearch, OverlapAnalysis, Pair
    from fastclip.eval.zero_shot import ZeroShotTask

logger = logging.getLogger("fastclip")

_SHEET_ACCEPTED, _SHEET_REJECTED = 16, 8


def add_overlap_verb(verbs: Any) -> None:
    """Add ``overlap``; `verbs` is what argparse's `add_subparsers` gives."""
    overlap = verbs.add_parser("overlap", help="evaluation images that were trained on")
    overlap.add_argument("path", type=Path, help="a run's folder, or one of its checkpoints")
    overlap.add_argument("--out", type=Path, required=True, help="folder of the results")
    overlap.add_argument("--train", help="shards trained on; default: the run's own")
    overlap.add_argument(
        "--task", action="append", metavar="NAME", help="a zero-shot task; default: all of the run"
    )
    overlap.add_argument("--radius", type=int, help="bits of 128 in which hashes may differ")
    overlap.add_argument("--cosine", type=float, help="least cosine of a duplicate's features")
    overlap.add_argument("--correlation", type=float, help="least correlation of its pixels")
    overlap.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    overlap.add_argument("overrides", nargs="*", metavar="eval.field=value")
    overlap.set_defaults(run=_overlap)


def _overlap(options: argparse.Namespace) -> int:
    from fastclip.eval.overlap import DuplicateSearch

    names = ("radius", "cosine", "correlation")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    search = DuplicateSearch(**given)
    analyses = run_overlap(
        options.path,
        options.out,
        search=search,
        train=options.train,
        tasks=options.task,
        overrides=options.overrides,
        device=options.device,
    )
    print(format_overlap(analyses))
    print(f"\n{options.out}: overlap.json, .txt and .png, and the pairs found")
    return 0


def run_overlap(
    path: Path,
    out: Path,
    *,
    search: DuplicateSearch,
    train: str | None = None,
    tasks: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> list[OverlapAnalysis]:
    """Find the training images among those of each zero-shot task, and compare accuracies.

    Writes into `out`: ``overlap.json``, ``.txt``, ``.png``; ``pairs_TASK.png`` for each task with
    candidates; and ``hashes/``, with which a run that was killed goes on.

    Args:
        path: a run or checkpoint; its own image features are compared.
        train: shards; None: the run's.
        tasks: names in the run's ``eval.zero_shot``; None: all.
        overrides: of the run's config.

    Raises:
        FileNotFoundError, ValueError, OSError: there is no such run, task or shard; a launcher has
            started several ranks; or see
            `find_duplicates`.
        ImportError: matplotlib or scipy is not installed.
    """
    from fastclip.data.hash_cache import HashCache
    from fastclip.data.index import index_shards
    from fastclip.data.pixels import PixelReader
    from fastclip.data.rewriting import write_text
    from fastclip.distributed.runtime import initialise_alone, shutdown
    from fastclip.eval.answers import answer_task
    from fastclip.eval.overlap import analyse_overlap, find_duplicates
    from fastclip.evaluate import load_trained, make_evaluator, run_config
    from fastclip.provenance import provenance

    config = run_config(path, overrides)
    chosen = choose_tasks(config, tasks)
    model, checkpoint = load_trained(path)
    images = index_shards(config.data.train if train is None else train, needs=())
    images.log_problems()
    out.mkdir(parents=True, exist_ok=True)
    runtime = initialise_alone(device, "this experiment")
    evaluator = make_evaluator(model, config, runtime)
    embed = _embedder(evaluator)
    analyses: list[OverlapAnalysis] = []
    report: list[dict[str, Any]] = []
    try:
        with PixelReader(
            workers=config.eval.workers, apply_orientation=config.data.apply_orientation
        ) as reader:
            cache = HashCache(out / "hashes", reader, logger.info)
            for task in chosen:
                answers = answer_task(evaluator, task)
                test = answers.index
                found = find_duplicates(
                    images,
                    test,
                    embed,
                    search=search,
                    reader=reader,
                    cache=cache,
                    image_size=evaluator.image_size,
                )
                correct = (answers.rank < 1).cpu().numpy()
                overlapping = _overlapping(answers.numbers, found)
                analysis = analyse_overlap(task.name, correct, overlapping)
                analyses.append(analysis)
                report.append(_as_json(analysis, found, images, test))
                _draw_pairs(out / f"pairs_{task.name}.png", task, found, images, test, reader)
    finally:
        shutdown()
    content = {
        "checkpoint": str(checkpoint),
        "train": config.data.train if train is None else train,
        "search": dataclasses.asdict(search),
        "significance_level": _level(analyses),
        "tasks": report,
        "provenance": provenance(),
    }
    write_text(out / "overlap.json", json.dumps(content, indent=1) + "\n")
    write_text(out / "overlap.txt", format_overlap(analyses) + "\n")
    _draw_figure(analyses, out / "overlap.png")
    return analyses


def choose_tasks(config: TrainConfig, names: Sequence[str] | None) -> list[ZeroShotTask]:
    """The zero-shot tasks of those names, in their order; all for None.

    Raises:
        ValueError: the config has no such task, or none at all.
    """
    tasks = {task.name: task for task in config.eval.zero_shot}
    if not tasks:
        raise ValueError("the run's config has no zero-shot task: set eval.zero_shot=[...]")
    for name in names or ():
        if name not in tasks:
            raise ValueError(f"no zero-shot task {name!r} in eval.zero_shot: {', '.join(tasks)}")
    return list(tasks.values()) if names is None else [tasks[name] for name in names]


def _embedder(evaluator: Evaluator) -> Callable[[Tensor], Tensor]:
    import torch

    device = evaluator.runtime.device

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad():
            return evaluator.model(images=images.to(device)).image_features.float().cpu()

    return embed


def _overlapping(numbers: Sequence[int], found: Duplicates) -> NDArray[np.bool_]:
    import numpy as np

    return np.isin(numbers, [pair.test for pair in found.pairs if pair.duplicate])


def _level(analyses: Sequence[OverlapAnalysis]) -> float:
    from fastclip.eval.overlap import significance_level

    return significance_level(analyses)


def _as_json(
    analysis: OverlapAnalysis, found: Duplicates, train: ShardIndex, test: ShardIndex
) -> dict[str, Any]:
    difference = analysis.difference
    return {
        **dataclasses.asdict(analysis),
        "overlap": analysis.overlap,
        "all_minus_clean": analysis.all_minus_clean,
        "overlap_minus_clean": None if difference is None else difference[0],
        "overlap_minus_clean_interval": None if difference is None else difference[1:],
        "train_images": found.train_images,
        "unreadable": found.unreadable,
        "candidates_not_compared": found.beyond,
        "pairs": [
            {
                "test": test[pair.test].key,
                "test_shard": str(test[pair.test].shard),
                "train": train[pair.train].key,
                "train_shard": str(train[pair.train].shard),
                "hamming": pair.hamming,
                "cosine": pair.cosine,
                "correlation": pair.correlation,
                "duplicate": pair.duplicate,
            }
            for pair in found.pairs
        ],
    }


def _draw_pairs(
    path: Path,
    task: ZeroShotTask,
    found: Duplicates,
    train: ShardIndex,
    test: ShardIndex,
    reader: PixelReader,
) -> None:
    """The pairs on both sides of the threshold: the duplicates most in doubt, then the nearest of
    the others."""
    from fastclip.data.pixels import whole
    from fastclip.report.contact_sheet import Hit, draw_contact_sheet

    ordered = sorted(found.pairs, key=lambda pair: pair.correlation)
    accepted = [pair for pair in ordered if pair.duplicate]
    rejected = [pair for pair in reversed(ordered) if not pair.duplicate]
    shown = [*accepted[:_SHEET_ACCEPTED], *rejected[:_SHEET_REJECTED]]
    if not shown:
        path.unlink(missing_ok=True)
        return

    def hit(index: ShardIndex, number: int, score: float, pair: Pair) -> Hit:
        pixels, _ = reader.read(index, [number], 96, whole)
        return Hit(pixels[0], score, pair.duplicate)

    rows = [
        (
            f"{_short(test[pair.test].key)} / {_short(train[pair.train].key)}: {pair.hamming} bits",
            [
                hit(test, pair.test, pair.cosine, pair),
                hit(train, pair.train, pair.correlation, pair),
            ],
        )
        for pair in shown
    ]
    title = f"{task.name}: {len(accepted)} of {len(found.pairs)} candidates; cosine, correlation"
    draw_contact_sheet(title, rows, path)


def _short(key: str) -> str:
    """A key that fits into a line of the sheet."""
    return key if len(key) <= 28 else f"{key[:14]}…{key[-13:]}"


def _draw_figure(analyses: Sequence[OverlapAnalysis], path: Path) -> None:
    from fastclip.report.overlap_figure import OverlapPoint, draw_overlap

    points, without = [], []
    for analysis in analyses:
        difference, change = analysis.difference, analysis.all_minus_clean
        if difference is None or change is None or analysis.p_value is None:
            without.append(f"{analysis.task} ({analysis.overlap:.0%} overlap)")
            continue
        points.append(
            OverlapPoint(
                name=analysis.task,
                overlap=analysis.overlap,
                difference=difference,
                all_minus_clean=change,
                p_value=analysis.p_value,
            )
        )
    draw_overlap(points, without, path)


def format_overlap(analyses: Sequence[OverlapAnalysis]) -> str:
    """A table of accuracies in per cent; a star marks what is significant after Bonferroni."""
    from fastclip.eval.table import columns

    level = _level(analyses)
    heads = ("task", "images", "overlap", "all", "clean", "on overlap", "99.5 % interval")
    rows: list[tuple[str, ...]] = [(*heads, "all - clean", "p")]
    for one in analyses:
        change = one.all_minus_clean
        p_value = "-"
        if one.p_value is not None:
            p_value = f"{one.p_value:.2g}{' *' if one.p_value < level else ''}"
        interval = "-" if one.interval is None else "{:.1%} to {:.1%}".format(*one.interval)
        row = (
            one.task,
            f"{one.images:,}",
            f"{one.overlapping:,} ({one.overlap:.2%})",
            f"{one.accuracy_all:.2%}",
            _per_cent(one.accuracy_clean),
            _per_cent(one.accuracy_overlap),
            interval,
            "-" if change is None else f"{100 * change:+.2f}",
            p_value,
        )
        rows.append(row)
    lines = [columns(rows)]
    tests = sum(one.p_value is not None for one in analyses)
    if tests:
        words = f"significant at 0.05 for {tests} test(s), after Bonferroni"
        lines.append(f"* p < {level:.2g}: {words}")
    return "\n".join(lines)


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
