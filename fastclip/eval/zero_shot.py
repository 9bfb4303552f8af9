"""Zero-shot classification (arXiv 2103.00020, section 3.1): texts make the classifier."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.data.eval_loader import EvalBatch
from fastclip.data.index import METADATA_EXTENSION, index_shards
from fastclip.data.remote import shown
from fastclip.distributed.collectives import all_gather_objects, all_gather_rows
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.prompts import check_templates, fill, imagenet_templates
from fastclip.eval.texts import own_share, own_text_features
from fastclip.ops.similarity import similarity


@dataclass(frozen=True, kw_only=True)
class ZeroShotTask:
    """Images to be told apart by the names of their classes alone."""

    name: str
    """Short name, the key of the results."""

    shards: str
    """Shards with the images and a json member each; see `expand_shards`."""

    classes: str
    """JSON file: {"label_field": field of the json member, "classes": [names]}.

    A label is a class's name or its place in the list.
    """

    templates: Literal["imagenet"] | tuple[str, ...] = "imagenet"
    """Texts with {} for a class's name; their features are averaged. Or the paper's 80."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The templates themselves."""
        return imagenet_templates() if self.templates == "imagenet" else self.templates

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"a zero-shot task's name is not empty and has no /: {self.name!r}")
        if self.templates != "imagenet":
            check_templates(self.templates, f"templates of zero-shot task {self.name}")


@dataclass(frozen=True)
class Classes:
    """The content of a task's classes file."""

    label_field: str
    names: tuple[str, ...]

    def index(self, batch: EvalBatch, source: str) -> Tensor:
        """Place of each sample's class in `names`, int64 [B].

        Raises:
            ValueError: a sample has no such field, or its label is not among the classes.
        """
        places = {name: place for place, name in enumerate(self.names)}
        result = []
        for key, about in zip(batch.keys, batch.metadata, strict=True):
            label = about.get(self.label_field)
            place = places.get(label) if isinstance(label, str) else label
            if (
                isinstance(place, bool)
                or not isinstance(place, int)
                or not 0 <= place < len(self.names)
            ):
                raise ValueError(
                    f"{source}: sample {key} has {self.label_field}={label!r}, which is none of "
                    f"the {len(self.names)} classes"
                )
            result.append(place)
        return torch.tensor(result, dtype=torch.int64)


def load_classes(path: str | Path) -> Classes:
    """Read a classes file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it lacks a field, or a class occurs twice.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        field, names = content["label_field"], content["classes"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is not a classes file, {{"label_field": ..., "classes": [...]}}: {error!r}'
        ) from None
    if not isinstance(field, str) or not isinstance(names, list) or not names:
        raise ValueError(f"{path}: label_field is a text and classes a list that is not empty")
    return Classes(field, check_names(names, path))


def check_names(names: Sequence[object], where: str | Path) -> tuple[str, ...]:
    """Names of classes that were read from `where`.

    Raises:
        ValueError: one is no text, or empty, or occurs twice.
    """
    checked = []
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: {name!r} is no name of a class")
        checked.append(name)
    repeated = [name for name, count in Counter(checked).items() if count > 1]
    if repeated:
        raise ValueError(f"{where}: these classes occur twice: {', '.join(repeated[:5])}")
    return tuple(checked)


def build_classifier(
    evaluator: Evaluator, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One unit-length text feature per class, fp32 [classes, D], on every rank; collective.

    A class's feature is the mean of its prompts' normalised features, normalised again ("ensembled
    in embedding space"). The ranks share the classes.
    """
    own, sizes = own_share(names, evaluator.runtime)
    texts = [text for name in own for text in fill(templates, name)]
    prompts = own_text_features(evaluator, texts, max(sizes) * len(templates))
    prompts = prompts.view(len(own), len(templates), prompts.shape[1])
    return all_gather_rows(F.normalize(prompts.mean(dim=1), dim=-1), sizes)


def rank_of_target(scores: Tensor, target: Tensor) -> Tensor:
    """How many other candidates score at least as high as the target's, int64 [B].

    Args:
        scores: [B, candidates].
        target: int64 [B], each row's right candidate.

    A tie counts against the model, so that features which have collapsed to one point score 0.
    A score that is not a number is never right.
    """
    right = scores.gather(1, target[:, None])
    return (~(scores < right)).sum(dim=1) - 1


def zero_shot(evaluator: Evaluator, task: ZeroShotTask) -> dict[str, float]:
    """Classify every image of the task; collective, the same result on every rank.

    Returns:
        ``top1`` and ``top5`` as fractions, and the numbers of ``images`` and ``classes``.
    """
    classes = load_classes(task.classes)
    classifier = build_classifier(evaluator, classes.names, task.texts)
    index = index_shards(task.shards, needs=(METADATA_EXTENSION,))
    top1 = top5 = images = 0
    problem: ValueError | None = None
    for batch in evaluator.batches(index):
        features = evaluator.image_features(batch)
        try:
            target = classes.index(batch, shown(task.shards))
        except ValueError as error:
            problem = problem or error  # told after the loop: other ranks still wait for this one
            continue
        scores = similarity(features, classifier, normalize=False)
        rank = rank_of_target(scores, target.to(features.device))
        top1 += int((rank < 1).sum())
        top5 += int((rank < 5).sum())
        images += len(batch)
    counts = all_gather_objects((top1, top5, images, problem))
    for *_, failed in counts:
        if failed is not None:
            raise failed
    total = sum(count[2] for count in counts)
    if total == 0:
        raise ValueError(
            f"zero-shot task {task.name}: no image of {shown(task.shards)} could be read"
        )
    return {
        "top1": sum(count[0] for count in counts) / total,
        "top5": sum(count[1] for count in counts) / total,
        "images": float(total),
        "classes": float(len(classes.names)),
    }
