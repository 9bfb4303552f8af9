"""A model on many labelled data sets, beside the paper's numbers (arXiv 2103.00020, section 3).

Zero-shot, linear probes and few-shot probes. A data set that fails is a row with the reason; the
others go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastclip.distributed.collectives import all_gather_objects
from fastclip.eval.datasets import PaperResult, paper_results
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.features import Features, extract_features
from fastclip.eval.few_shot import FewShotResult, few_shot
from fastclip.eval.layout import LabelledDataset, Split, open_dataset
from fastclip.eval.linear_probe import ProbeResult, linear_probe
from fastclip.eval.measures import TOP5
from fastclip.eval.table import columns
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
    """Of the test split, measured on."""

    left_out: int = 0
    """Of the test split: images that could not be read or whose label is none of the classes, and
    what is no image."""

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

    note: str = ""

    failures: list[str] = field(default_factory=list)
    """What could not be done, and why."""

    seconds: float = 0.0


def run_benchmark(
    evaluator: Evaluator,
    root: Path,
    *,
    names: Sequence[str],
    protocol: Protocol,
    preset: str | None,
    same_scale: bool,
) -> list[Row]:
    """A row for each data set of `names` below `root`; collective, the same on every rank.

    The model computes in evaluation mode and is put back into the mode it was in.

    Args:
        names: from `find_datasets`.
        preset: the paper's model that rows are set beside.
        same_scale: whether the model has that one's architecture.
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
                logger.info(
                    "%s: %s images, zero-shot %s, %.1f s",
                    name,
                    f"{row.images:,}",
                    _per_cent(None if row.zero_shot is None else row.zero_shot.value),
                    row.seconds,
                )
    finally:
        model.train(training)
    return rows


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
        scale = () if same_scale else (f"scale: this model is no {preset}",)
        row.zero_shot_differs = (*_differences(row, dataset, False), *scale)
        row.linear_probe_differs = (*_differences(row, dataset, True), *scale)
    if differs := _differences(row, dataset, False):
        logger.warning("%s is not quite the paper's: %s", row.dataset, "; ".join(differs))


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


def _same_everywhere(open_it: Callable[[], LabelledDataset]) -> LabelledDataset:
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


def format_rows(rows: Sequence[Row], preset: str | None) -> str:
    """The results as a table in per cent, the paper's beside them, and what to know of them.

    "≠ data", "≠ scale", "≠ measure" mark numbers of the paper that are of something else, – what
    was not measured or is not known.
    """
    shots = sorted({k for row in rows for k in row.few_shot or ()})
    heads = ["data set", "images", "classes", "measure", "zero-shot", "95 %", "top-5"]
    heads += ["probe", *(f"{k}-shot" for k in shots)]
    if preset is not None:
        heads += [f"{preset}: zero-shot", "", "probe", ""]
    table = [heads]
    for row in rows:
        zero, probe = row.zero_shot, row.linear_probe
        cells = [
            row.dataset,
            f"{row.images:,}" if row.images else "–",
            f"{row.classes:,}" if row.classes else "–",
            row.metric or "–",
            _per_cent(None if zero is None else zero.value),
            "–" if zero is None else f"{100 * zero.low:.1f}–{100 * zero.high:.1f}",
            _per_cent(row.top5),
            _per_cent(None if probe is None else probe.value),
            *(_per_cent(row.few_shot[k].mean if row.few_shot else None) for k in shots),
        ]
        if preset is not None:
            paper = row.paper
            cells += [
                _per_cent(None if paper is None else paper.zero_shot),
                _marks(row.zero_shot_differs),
                _per_cent(None if paper is None else paper.linear_probe),
                _marks(row.linear_probe_differs) if probe is not None else "",
            ]
        table.append(cells)
    lines = [columns(table)]
    lines += [f"{row.dataset}: {differs}" for row in rows for differs in _all_differences(row)]
    lines += [
        f"{row.dataset}: {row.left_out:,} of the test split left out"
        for row in rows
        if row.left_out
    ]
    lines += [f"{row.dataset} failed: {failure}" for row in rows for failure in row.failures]
    if any(row.paper is not None for row in rows):
        lines.append(
            "The paper's numbers (arXiv 2103.00020, Tables 10 and 11) are of its own training data "
            "and, except on ImageNet, its own prompts."
        )
    return "\n".join(lines)


def _all_differences(row: Row) -> list[str]:
    probe = row.linear_probe_differs if row.linear_probe is not None else ()
    return list(dict.fromkeys((*row.zero_shot_differs, *probe)))


def _marks(differs: Sequence[str]) -> str:
    kinds = dict.fromkeys(each.partition(":")[0] for each in differs)
    return "≠ " + ", ".join(kinds) if kinds else ""


def _per_cent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def summary(rows: Sequence[Row]) -> str:
    """One line: how many data sets, their mean, how many failed."""
    values = [row.zero_shot.value for row in rows if row.zero_shot is not None]
    failed = sum(bool(row.failures) for row in rows)
    mean = f", zero-shot {sum(values) / len(values):.1%} on average" if values else ""
    return f"{len(rows)} data set(s){mean}, {failed} failed"
