"""The evaluations of a run, as data; all of them at once, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastclip.data.shards import expand_shards
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.retrieval import RECALL_HEADS, RetrievalTask, recall_cells, retrieval
from fastclip.eval.table import columns
from fastclip.eval.zero_shot import ZeroShotTask, load_classes, zero_shot


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is evaluated, in the loop and by ``fastclip eval``."""

    zero_shot: tuple[ZeroShotTask, ...] = ()
    """Zero-shot classification tasks."""

    retrieval: tuple[RetrievalTask, ...] = ()
    """Retrieval tasks."""

    batch_size: int = 256
    """Images or texts per forward pass of a rank."""

    workers: int = 2
    """Decoding threads of a rank."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 1:
            raise ValueError("eval.batch_size and eval.workers are at least 1")
        for kind, tasks in (("zero_shot", self.zero_shot), ("retrieval", self.retrieval)):
            names = [task.name for task in tasks]
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"eval.{kind} has two tasks named {', '.join(repeated)}")


def check_tasks(config: EvalConfig) -> None:
    """Find before training what an evaluation at its end would lack, on this machine.

    Raises:
        FileNotFoundError, ValueError: there are no such shards, or the classes are not read.
    """
    for kind, tasks in (("zero_shot", config.zero_shot), ("retrieval", config.retrieval)):
        for task in tasks:
            try:
                if "://" not in task.shards:
                    expand_shards(task.shards)
                if isinstance(task, ZeroShotTask):
                    load_classes(task.classes)
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"eval.{kind}, task {task.name}: {error}") from None


def run_suite(evaluator: Evaluator, config: EvalConfig) -> dict[str, float]:
    """Every task's numbers under ``kind/task/measure``; collective, the same on every rank.

    The model is put back into the mode it was in. Nothing here draws random numbers, so that
    evaluating does not change the training that follows.
    """
    model = evaluator.model
    training = model.training
    model.eval()
    metrics: dict[str, float] = {}
    try:
        with torch.no_grad():
            for task in config.zero_shot:
                numbers = zero_shot(evaluator, task)
                metrics |= {f"zero_shot/{task.name}/{key}": v for key, v in numbers.items()}
            for pairs in config.retrieval:
                numbers = retrieval(evaluator, pairs)
                metrics |= {f"retrieval/{pairs.name}/{key}": v for key, v in numbers.items()}
    finally:
        model.train(training)
    return metrics


def format_table(metrics: Mapping[str, float]) -> str:
    """`run_suite`'s numbers as two small tables, in per cent."""
    tasks: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in metrics.items():
        kind, name, measure = key.split("/")
        tasks.setdefault((kind, name), {})[measure] = value
    zero_shot_rows = [
        [
            name,
            f"{numbers['images']:,.0f}",
            f"{numbers['classes']:,.0f}",
            f"{numbers['top1']:.2%}",
            f"{numbers['top5']:.2%}",
            f"{1 / numbers['classes']:.2%}",
        ]
        for (kind, name), numbers in tasks.items()
        if kind == "zero_shot"
    ]
    retrieval_rows = [
        [name, *recall_cells(numbers)]
        for (kind, name), numbers in tasks.items()
        if kind == "retrieval"
    ]
    blocks = []
    if zero_shot_rows:
        heads = ["zero-shot", "images", "classes", "top-1", "top-5", "chance top-1"]
        blocks.append(columns([heads, *zero_shot_rows]))
    if retrieval_rows:
        blocks.append(columns([["retrieval", *RECALL_HEADS], *retrieval_rows]))
    return "\n\n".join(blocks) or "no evaluation is configured"
