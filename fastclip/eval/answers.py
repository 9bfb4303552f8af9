"""What a model answers to each image of a zero-shot task: for mistakes, finds and analyses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.data.index import METADATA_EXTENSION, ShardIndex, index_shards
from fastclip.data.remote import shown
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.zero_shot import (
    Classes,
    ZeroShotTask,
    build_classifier,
    load_classes,
    rank_of_target,
)
from fastclip.ops.similarity import similarity, similarity_topk

_CHUNK_SCORES = 2**24  # scores in memory at once: 64 MiB


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's features of a task, and what they say."""

    classes: Classes
    templates: tuple[str, ...]
    index: ShardIndex

    numbers: Sequence[int]
    """Places in the index of the images that could be used."""

    images: Tensor
    """fp32 [N, D], of unit length."""

    classifier: Tensor
    """fp32 [classes, D], of unit length."""

    target: Tensor
    """int64 [N], each image's class."""

    answer: Tensor
    """int64 [N], the class whose text is nearest."""

    rank: Tensor
    """int64 [N], how many other classes are at least as near as the right one."""

    def nearest_images(self, classes: int, images: int) -> list[tuple[int, list[float], list[int]]]:
        """For some of the classes that the images show, the images that fit their texts best.

        Returns:
            Class, similarities and rows of `images`, best first. The classes are spread over the
            list of those that are shown: neighbours are often alike.
        """
        present = self.target.unique()
        chosen = present[:: max(1, len(present) // classes)][:classes]
        values, rows = similarity_topk(
            self.classifier[chosen], self.images, min(images, len(self.images)), normalize=False
        )
        return list(zip(chosen.tolist(), values.tolist(), rows.tolist(), strict=True))


def answer_task(evaluator: Evaluator, task: ZeroShotTask) -> Answers:
    """Every image of the task beside every class.

    Args:
        evaluator: of one rank, its model in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: see `index_shards`, `load_classes`; or a sample's label is
            none of the classes, or no image can be read.
    """
    if evaluator.runtime.world_size > 1:
        raise ValueError("a task's answers are computed in one process, not by several ranks")
    classes = load_classes(task.classes)
    index = index_shards(task.shards, needs=(METADATA_EXTENSION,))
    features, targets = [], []
    numbers: list[int] = []
    with torch.no_grad():
        classifier = build_classifier(evaluator, classes.names, task.texts)
        for batch in evaluator.batches(index):
            features.append(evaluator.image_features(batch))
            targets.append(classes.index(batch, shown(task.shards)))
            numbers += batch.numbers
        if not numbers:
            raise ValueError(
                f"zero-shot task {task.name}: no image of {shown(task.shards)} could be read"
            )
        images = torch.cat(features)
        target = torch.cat(targets).to(images.device)
        answers, ranks = [], []
        rows = max(1, _CHUNK_SCORES // len(classifier))
        for part, right in zip(images.split(rows), target.split(rows), strict=True):
            scores = similarity(part, classifier, normalize=False)
            answers.append(scores.argmax(dim=1))
            ranks.append(rank_of_target(scores, right))
    return Answers(
        classes=classes,
        templates=task.texts,
        index=index,
        numbers=numbers,
        images=images,
        classifier=classifier,
        target=target,
        answer=torch.cat(answers),
        rank=torch.cat(ranks),
    )
