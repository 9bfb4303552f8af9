"""A model on many data sets, beside the paper's numbers (arXiv 2103.00020, section 3).

Zero-shot, linear probes and few-shot probes of labelled ones, retrieval of captioned ones. A data
set that fails is a row with the reason; the others go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastclip.distributed.collectives import all_gather_objects
from fastclip.eval.captioned import CaptionedDataset
from fastclip.eval.datasets import (
    CAPTION_TEMPLATE,
    CAPTIONS_PER_IMAGE,
    PaperResult,
    paper_results,
    paper_retrieval,
)
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.features import Features, extract_features
from fastclip.eval.few_shot import FewShotResult, few_shot
from fastclip.eval.layout import LabelledDataset, Split, open_dataset
from fastclip.eval.linear_probe import ProbeResult, linear_probe
from fastclip.eval.measures import TOP5
from fastclip.eval.retrieval import DIRECTIONS, embed_images, embed_pairs, recall
from fastclip.eval.zero_shot import build_classifier
from fastclip.ops.similarity import similarity

logger = logging.getLogger("fastclip")

SHOTS = (1, 2, 4, 8, 16)

Failure = ValueError | OSError | ImportError
"""What makes a row of its own; anything else is an error of the program."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured on each data set."""

    zero_shot: bool = True
    linear_probe: bool = False

    shots: tuple[int, ...] = ()
    """Training images of each class of a few-shot probe; () for none."""

    repeats: int = 10
    """Draws of each few-shot probe."""

    seed: int = 0
    """Of the bootstrap, of the images that choose a probe's strength, and of few-shot draws."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that have to be read."""
        probes = self.linear_probe or self.shots
        return ("train", "val", "test") if probes else ("test",)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measure with its 95 % interval; fractions."""

    value: float
    low: float
    high: float


@dataclass(kw_only=True)
class Row:
    """The results on one data set; None where a number was not asked for or could not be found."""

    dataset: str
    title: str = ""
    metric: str = ""
    classes: int = 0

    images: int = 0
    """Of the test split, measured on; with the captions that most images have."""

    left_out: int = 0
    """Of the test split: images that could not be read, whose label is none of the classes or that
    have no caption, and what is no image."""

    train_images: int = 0
    """Of the training and validation splits."""

    zero_shot: Measured | None = None

    top5: float | None = None
    """Share of the images whose class is among the five nearest; where there are more classes."""

    linear_probe: ProbeResult | None = None
    few_shot: dict[int, FewShotResult] | None = None

    paper: PaperResult | None = None
    """The numbers of the model compared with."""

    zero_shot_differs: tuple[str, ...] = ()
    """Why the paper's zero-shot number is of something else: "data: …", "scale: …"; () where it is
    comparable."""

    linear_probe_differs: tuple[str, ...] = ()
    """As above, of the linear probe's."""

    retrieval: dict[str, dict[str, float]] | None = None
    """Of a captioned data set what `recall` gives, by the name of the captions; {} where nothing
    could be measured."""

    paper_retrieval: dict[str, float] | None = None
    """The recalls of the model compared with, with English captions."""

    retrieval_differs: tuple[str, ...] = ()
    """As above, of retrieval's."""

    note: str = ""

    failures: list[str] = field(default_factory=list)
    """What could not be done, and why."""

    seconds: float = 0.0

    @property
    def comparable(self) -> bool:
        """Whether zero-shot or recalls stand beside the paper's of the same data and scale."""
        zero_shot = self.paper is not None and not self.zero_shot_differs
        return zero_shot or (self.paper_retrieval is not None and not self.retrieval_differs)


def run_benchmark(
    evaluator: Evaluator,
    root: Path,
    *,
    names: Sequence[str],
    protocol: Protocol,
    preset: str | None,
    same_scale: bool,
    measured: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """A row for each data set of `names` below `root`; collective, the same on every rank.

    The model computes in evaluation mode and is put back into the mode it was in.

    Args:
        names: from `find_datasets`.
        preset: the paper's model that rows are set beside.
        same_scale: whether the model has that one's architecture.
        measured: called on each rank after each data set, with the rows so far.
    """
    model = evaluator.model
    training = model.training
    model.eval()
    rows = []
    try:
        with torch.no_grad():
            for name in names:
                begin = time.perf_counter()
                row = Row(dataset=name)
                try:
                    _fill(row, evaluator, protocol, root, preset, same_scale)
                except (ValueError, OSError, ImportError) as error:
                    _fail(row, "", error)
                row.seconds = time.perf_counter() - begin
                rows.append(row)
                images = f"{row.images:,} images"
                logger.info("%s: %s, %s, %.1f s", name, images, _outcome(row), row.seconds)
                if measured is not None:
                    measured(rows)
    finally:
        model.train(training)
    return rows


def _outcome(row: Row) -> str:
    if row.retrieval:
        first = next(iter(row.retrieval.values()))
        found = [f"{way.replace('_', ' ')} R@1 {first[f'{way}_r1']:.1%}" for way in DIRECTIONS]
        return ", ".join(found)
    return "no result" if row.zero_shot is None else f"zero-shot {row.zero_shot.value:.1%}"


def _features(evaluator: Evaluator, split: Split) -> Features:
    """On the runtime's device."""
    if evaluator.runtime.is_main:
        split.source.log_problems()
    found = extract_features(evaluator, split.source, split.labels)
    return found.to(evaluator.runtime.device)


def _fill(
    row: Row,
    evaluator: Evaluator,
    protocol: Protocol,
    root: Path,
    preset: str | None,
    same_scale: bool,
) -> None:
    dataset = _same_everywhere(lambda: open_dataset(root, row.dataset, protocol.splits))
    if isinstance(dataset, CaptionedDataset):
        _retrieve(row, evaluator, dataset, preset, same_scale)
        return
    row.title, row.metric = dataset.title, dataset.metric.title
    row.classes, row.note = len(dataset.classes), dataset.note
    test = _features(evaluator, dataset.splits["test"])
    source = dataset.splits["test"].source
    row.images, row.left_out = len(test), len(source) - len(test) + len(source.problems)
    if protocol.zero_shot:
        classifier = build_classifier(evaluator, dataset.classes, dataset.templates)
        scores = similarity(test.embedding, classifier, normalize=False)
        low, high = dataset.metric.interval(scores, test.labels, seed=protocol.seed)
        value = dataset.metric(scores, test.labels)
        row.zero_shot = Measured(value=value, low=low, high=high)
        if test.labels.ndim == 1 and row.classes > 5:
            row.top5 = TOP5(scores, test.labels)
    _probe(row, evaluator, protocol, dataset, test)
    if preset is not None and dataset.paper is not None:
        row.paper = paper_results()[preset][dataset.paper.name]
        scale = _scale_differs(preset, same_scale)
        row.zero_shot_differs = (*_differences(row, dataset, False), *scale)
        row.linear_probe_differs = (*_differences(row, dataset, True), *scale)
    if differs := _differences(row, dataset, False):
        logger.warning("%s is not quite the paper's: %s", row.dataset, "; ".join(differs))


def _scale_differs(preset: str, same_scale: bool) -> tuple[str, ...]:
    return () if same_scale else (f"scale: this model is no {preset}",)


def _retrieve(
    row: Row, evaluator: Evaluator, dataset: CaptionedDataset, preset: str | None, same_scale: bool
) -> None:
    """Recall with each of the captions."""
    row.title, row.note, row.metric = dataset.title, dataset.note, "recall"
    if evaluator.runtime.is_main:
        dataset.source.log_problems()
    images = embed_images(evaluator, dataset.source)
    row.retrieval = {}
    for name, task in dataset.tasks.items():
        try:
            pairs = embed_pairs(evaluator, task, images)
        except ValueError as error:  # of all ranks alike
            _fail(row, f"{name}: ", error)
        else:
            row.retrieval[name] = recall(pairs, evaluator.runtime)
    if not row.retrieval:
        return
    row.images = max(int(numbers["images"]) for numbers in row.retrieval.values())
    row.left_out = len(dataset.source) - row.images + len(dataset.source.problems)
    if preset is not None and (paper := paper_retrieval().get(preset, {}).get(dataset.name)):
        row.paper_retrieval = paper
        differs = _caption_differences(dataset, row.retrieval, paper)
        row.retrieval_differs = (*differs, *_scale_differs(preset, same_scale))


def _caption_differences(
    dataset: CaptionedDataset, found: dict[str, dict[str, float]], paper: dict[str, float]
) -> Iterator[str]:
    """In what a captioned set, or how it is asked, is not the paper's."""
    name, numbers = next(iter(found.items()))
    images = numbers["images"]
    if images != paper["images"]:
        yield f"data: {images:,.0f} test images, the paper's {paper['images']:,.0f}"
    each = numbers["captions"] / images
    if round(each) != CAPTIONS_PER_IMAGE:
        yield f"data: {each:.1f} captions of an image, the paper's {CAPTIONS_PER_IMAGE}"
    if (template := dataset.tasks[name].template) != CAPTION_TEMPLATE:
        yield f"prompt: texts are asked for as {template}, in the paper as {CAPTION_TEMPLATE}"


def _probe(
    row: Row,
    evaluator: Evaluator,
    protocol: Protocol,
    dataset: LabelledDataset,
    test: Features,
) -> None:
    """Probes; one that fails leaves the other, and zero-shot's number, alone."""
    if not protocol.linear_probe and not protocol.shots:
        return
    try:
        if "train" not in dataset.splits:
            raise ValueError("there is no split train to fit probes to")
        train = _features(evaluator, dataset.splits["train"])
        val = _features(evaluator, dataset.splits["val"]) if "val" in dataset.splits else None
    except (ValueError, OSError) as error:
        _fail(row, "probes: ", error)
        return
    row.train_images = len(train) + (0 if val is None else len(val))
    metric, seed = dataset.metric, protocol.seed
    if protocol.linear_probe:
        try:
            row.linear_probe = linear_probe(train, val, test, metric=metric, seed=seed)
        except (ValueError, ImportError) as error:
            _fail(row, "linear probe: ", error)
    if protocol.shots:
        try:
            row.few_shot = few_shot(
                train, test, shots=protocol.shots, repeats=protocol.repeats, seed=seed,
                metric=metric,
            )  # fmt: skip
        except (ValueError, ImportError) as error:
            _fail(row, "few-shot: ", error)


def _fail(row: Row, what: str, error: Failure) -> None:
    row.failures.append(f"{what}{error}")
    logger.warning("%s failed: %s%s", row.dataset, what, error)


def _same_everywhere(
    open_it: Callable[[], LabelledDataset | CaptionedDataset],
) -> LabelledDataset | CaptionedDataset:
    """Its result, or on every rank the first error of any: others must not wait for this one."""
    problem: Failure | None = None
    dataset = None
    try:
        dataset = open_it()
    except (ValueError, OSError, ImportError) as error:
        problem = error
    for failed in all_gather_objects(problem):
        if failed is not None:
            raise failed
    assert dataset is not None
    return dataset


def _differences(row: Row, dataset: LabelledDataset, probe: bool) -> tuple[str, ...]:
    """In what the data are not the paper's."""
    paper = dataset.paper
    if paper is None:
        return ()
    counts = [
        ("classes", row.classes, paper.classes),
        ("test images", row.images, paper.test),
    ]
    if probe:
        counts.append(("training images", row.train_images, paper.train))
    found = [
        f"data: {ours:,} {what}, the paper's {theirs:,}"
        for what, ours, theirs in counts
        if ours != theirs
    ]
    if dataset.metric is not paper.metric:
        found.append(f"measure: {dataset.metric.title}, the paper's {paper.metric.title}")
    return tuple(found)
