"""``fastclip report``: a run's numbers, mistakes and finds, worked out for its report."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.config import TrainConfig, to_dict
from fastclip.data.index import ShardIndex, index_shards
from fastclip.data.pixels import PixelReader
from fastclip.data.rewriting import check_target, write_text
from fastclip.data.transforms import centre_crop
from fastclip.distributed.runtime import initialise_alone, shutdown
from fastclip.eval.answers import answer_task
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.prompts import fill
from fastclip.eval.retrieval import (
    DIRECTIONS,
    RECALL_AT,
    Pairs,
    RetrievalTask,
    embed_images,
    embed_pairs,
    recall,
)
from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.evaluate import load_trained, make_evaluator, run_config, run_folder
from fastclip.metrics import duration
from fastclip.models.clip import Clip
from fastclip.ops.similarity import similarity, similarity_topk
from fastclip.provenance import short
from fastclip.report.learning_curve import read_lines, read_metrics
from fastclip.report.page import (
    Confusion,
    Matrix,
    Picture,
    RetrievalPart,
    RunPage,
    ZeroShotPart,
    picture,
    render,
)
from fastclip.report.run_curves import evaluation_curves, speed_curves, training_curves

_GALLERY_TEXTS, _GALLERY_IMAGES = 8, 7
_CONFUSIONS = 12
_MATRIX_CLASSES = 30
_BATCH_PAIRS = 20


def write_report(
    path: Path, out: Path | None, overrides: Sequence[str] = (), *, device: str = "auto"
) -> Path:
    """Write the report of a run as one HTML file; returns where.

    Args:
        path: a run's folder, or a checkpoint in it; the newest is described otherwise.
        out: the file; None: ``report.html`` in the run's folder.
        overrides: of the run's config (``eval.batch_size=64``), for where its data lie now.

    Raises:
        FileNotFoundError: there is no run, no metrics, no checkpoint, or its data are elsewhere.
        ValueError: a file of it is damaged, a field does not exist, or `out` is a folder.
        OSError: `out` cannot be written.
        ImportError: matplotlib or jinja2 is not installed.
    """
    folder = run_folder(path)
    target = out or folder / "report.html"
    check_target(target)
    config = run_config(path, overrides)
    rows = read_metrics(folder / "metrics.jsonl")
    model, checkpoint = load_trained(path)
    runtime = initialise_alone(device, "fastclip report")
    try:
        with (
            torch.inference_mode(),
            PixelReader(
                workers=config.eval.workers, apply_orientation=config.data.apply_orientation
            ) as reader,
        ):
            view = _View(make_evaluator(model, config, runtime), reader)
            page = RunPage(
                title=f"Run {folder.resolve().name}",
                subtitle=f"{checkpoint.name} of {folder}",
                facts=_facts(rows, config, model),
                curves=[*training_curves(rows), *evaluation_curves(rows)],
                speed=speed_curves(rows),
                zero_shot=[view.zero_shot(task) for task in config.eval.zero_shot],
                retrieval=[view.retrieval(task) for task in config.eval.retrieval],
                **_origin(folder),
                config=json.dumps(to_dict(config), indent=2, ensure_ascii=False),
                notes=_notes(rows, config),
            )
    finally:
        shutdown()
    write_text(target, render(page))
    return target


@dataclass
class _View:
    """A model's answers to the tasks of its run."""

    evaluator: Evaluator
    reader: PixelReader

    def zero_shot(self, task: ZeroShotTask) -> ZeroShotPart:
        """Accuracy, mistakes and finds."""
        found = answer_task(self.evaluator, task)
        names, target = found.classes.names, found.target
        shots = _Shots(found.index, found.numbers, self.evaluator.image_size, self.reader)
        gallery = [
            (
                fill(found.templates, names[place])[0],
                shots.found(scores, rows, [int(target[row]) == place for row in rows]),
            )
            for place, scores, rows in found.nearest_images(_GALLERY_TEXTS, _GALLERY_IMAGES)
        ]
        return ZeroShotPart(
            name=task.name,
            images=len(target),
            classes=len(names),
            top1=float((found.rank < 1).float().mean()),
            top5=float((found.rank < 5).float().mean()),
            confusions=_confusions(names, target, found.answer, shots),
            matrix=_confusion_matrix(names, target, found.answer),
            gallery=gallery,
        )

    def retrieval(self, task: RetrievalTask) -> RetrievalPart:
        """Recall, finds in both directions, and the similarities of some pairs."""
        found_images = embed_images(self.evaluator, index_shards(task.shards, needs=()))
        pairs = embed_pairs(self.evaluator, task, found_images)
        images, texts, captions = pairs.images.features, pairs.texts, pairs.captions
        measured = recall(pairs, self.evaluator.runtime)
        right = set(map(tuple, pairs.right.tolist()))
        first_image: dict[int, int] = dict(reversed(pairs.by_text().tolist()))
        shots = _Shots(
            pairs.images.index, pairs.images.numbers, self.evaluator.image_size, self.reader
        )
        asked = list(range(0, len(texts), max(1, len(texts) // _GALLERY_TEXTS)))[:_GALLERY_TEXTS]
        values, rows = similarity_topk(
            texts[asked], images, min(_GALLERY_IMAGES, len(images)), normalize=False
        )
        text_to_image = [
            (
                captions[text],
                shots.found(values, rows, [(row, text) in right for row in rows]),
            )
            for text, values, rows in zip(asked, values.tolist(), rows.tolist(), strict=True)
        ]
        shown = [first_image[text] for text in asked]
        values, found = similarity_topk(images[shown], texts, min(5, len(texts)), normalize=False)
        image_to_text = [
            (
                shot,
                [
                    (captions[text], value, (image, text) in right)
                    for value, text in zip(values, places, strict=True)
                ],
            )
            for shot, image, values, places in zip(
                shots.pictures(shown), shown, values.tolist(), found.tolist(), strict=True
            )
        ]
        spread = list(range(0, len(texts), max(1, len(texts) // _BATCH_PAIRS)))[:_BATCH_PAIRS]
        return RetrievalPart(
            name=task.name,
            recall=[
                (words, [measured[f"{way}_r{k}"] for k in RECALL_AT])
                for way, words in zip(
                    DIRECTIONS, ("text found for an image", "image found for a text"), strict=True
                )
            ],
            images=len(images),
            texts=len(texts),
            text_to_image=text_to_image,
            image_to_text=image_to_text,
            similarities=_similarities(
                pairs, spread, [first_image[text] for text in spread], shots
            ),
        )


@dataclass(frozen=True)
class _Shots:
    """Pictures of samples, read again when they are shown: all of a set may not fit in memory."""

    index: ShardIndex
    numbers: Sequence[int]
    size: int
    reader: PixelReader

    def pictures(self, rows: Sequence[int]) -> list[Picture]:
        return self.found([None] * len(rows), rows, [None] * len(rows))

    def found(
        self,
        scores: Sequence[float | None],
        rows: Sequence[int],
        right: Sequence[bool | None],
    ) -> list[Picture]:
        numbers = [self.numbers[row] for row in rows]
        pixels, _ = self.reader.read(self.index, numbers, self.size, centre_crop)
        return [
            picture(image, score=score, right=hit, name=self.index[number].key)
            for image, number, score, hit in zip(pixels, numbers, scores, right, strict=True)
        ]


def _confusions(
    names: Sequence[str], target: Tensor, answer: Tensor, shots: _Shots
) -> list[Confusion]:
    """The commonest mistakes; of equally common ones, those spread over the classes."""
    truth, said = target.tolist(), answer.tolist()
    of = Counter(truth)
    first: dict[tuple[int, int], int] = {}
    counts: Counter[tuple[int, int]] = Counter()
    for row, pair in enumerate(zip(truth, said, strict=True)):
        if pair[0] != pair[1]:
            counts[pair] += 1
            first.setdefault(pair, row)
    most = counts.most_common()
    if most and most[0][1] == 1:
        most = most[:: max(1, len(most) // _CONFUSIONS)]
    shown = most[:_CONFUSIONS]
    examples = shots.pictures([first[pair] for pair, _ in shown])
    return [
        Confusion(names[a], names[b], count, of[a], example)
        for ((a, b), count), example in zip(shown, examples, strict=True)
    ]


def _confusion_matrix(names: Sequence[str], target: Tensor, answer: Tensor) -> Matrix | None:
    if len(names) > _MATRIX_CLASSES:
        return None
    size = len(names)
    counts = torch.bincount(target * size + answer, minlength=size * size).view(size, size)
    of = counts.sum(dim=1, keepdim=True).clamp(min=1)
    return Matrix(names, names, counts.tolist(), 0, (counts / of).tolist())


def _similarities(
    pairs: Pairs, texts: list[int], images: list[int], shots: _Shots
) -> Matrix | None:
    """Of some texts beside an image of each."""
    if len(texts) < 2:
        return None
    values = similarity(pairs.texts[texts], pairs.images.features[images], normalize=False)
    spread = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-6)
    return Matrix(
        [pairs.captions[text] for text in texts],
        (),
        values.tolist(),
        2,
        spread.tolist(),
        shots.pictures(images),
    )


def _facts(
    rows: Sequence[dict[str, Any]], config: TrainConfig, model: Clip
) -> list[tuple[str, str]]:
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise ValueError("no training step has been logged yet")
    last = steps[-1]
    seconds = pairs = waited = 0.0
    before = 0
    for row in steps:
        window = row.get("step_seconds") or 0.0
        seconds += window * (row["step"] - before)
        waited += window * (row["step"] - before) * (row.get("data_wait") or 0.0)
        pairs += (row["step"] - before) * config.run.global_batch_size
        before = row["step"]
    memory = [row["memory_gib"] for row in steps if row.get("memory_gib") is not None]
    facts = [
        ("steps", f"{last['step']:,}"),
        ("epochs", f"{last['epoch']:.2f}"),
        ("pairs seen", f"{pairs:,.0f}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M"),
        ("last loss", f"{float(last['loss']):.4f}"),
        ("logit scale", f"{float(last['logit_scale']):.2f}"),
    ]
    if seconds:
        facts += [
            ("training time", duration(seconds)),
            ("pairs per second", f"{pairs / seconds:,.0f}"),
            ("waiting for data", f"{waited / seconds:.1%}"),
        ]
    if memory:
        facts.append(("peak memory", f"{max(memory):.2f} GiB"))
    return facts


def _notes(rows: Sequence[dict[str, Any]], config: TrainConfig) -> list[str]:
    notes = []
    bad = [row for row in rows if "loss" in row and not math.isfinite(float(row["loss"]))]
    if bad:
        notes.append(f"{len(bad)} logged step(s) had a loss that is not finite.")
    skipped = max((row.get("skipped_steps") or 0 for row in rows), default=0)
    if skipped:
        notes.append(f"{skipped:,.0f} update(s) were skipped: their gradient was not finite.")
    if not config.eval.zero_shot and not config.eval.retrieval:
        notes.append("This run has no evaluation tasks: eval.zero_shot, eval.retrieval.")
    return notes


def _origin(folder: Path) -> dict[str, Any]:
    """What the launches say of themselves; runs of older versions say nothing."""
    path = folder / "launches.jsonl"
    launches = read_lines(path) if path.is_file() else []
    shown_launches = []
    versions: dict[str, str] = {}
    for number, each in enumerate(launches, 1):
        texts = [each.get(name) for name in ("begin", "description", "machine")]
        versions = each.get("versions", {})
        if not all(isinstance(text, str) for text in texts) or not isinstance(versions, dict):
            raise ValueError(f"{path}, line {number} describes no launch")
        begin, description, machine = map(str, texts)
        commit = each.get("commit")
        code = short(None if commit is None else str(commit))
        step = f"{each['step']:,}"
        shown_launches.append((begin.replace("T", " "), step, description, machine, code))
    return {"launches": shown_launches, "versions": [(k, str(v)) for k, v in versions.items()]}
