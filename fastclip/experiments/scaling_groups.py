"""Zero-shot errors at the level of groups: is the label that fits best of the right kind?

The names of the demo's groups ("animals nature") are no captions that training has seen, so that a
classifier made of them says little. Here the classes are the labels themselves, and a prediction
counts as right when it has the image's group; a label without a group never is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastclip.data.decode import BadSampleError
from fastclip.data.index import METADATA_EXTENSION, index_shards
from fastclip.data.reader import Members
from fastclip.distributed.runtime import Runtime
from fastclip.eval.answers import answer_task
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.zero_shot import ZeroShotTask, load_classes
from fastclip.evaluate import load_trained
from fastclip.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GroupTask:
    """Images whose label has a group, and where every label's group is known from."""

    name: str
    """Key of the results."""

    shards: str
    """Test images with a json member each."""

    classes: str
    """The labels that are told apart; see `ZeroShotTask.classes`."""

    known: tuple[str, ...]
    """Shards whose json members pair labels with groups."""

    field: str = "group"
    """Of the json members."""


def label_groups(task: GroupTask) -> dict[str, str]:
    """The group of each class, where there is one.

    Raises:
        ValueError: two samples give one label different groups.
    """
    classes = load_classes(task.classes)
    wanted = set(classes.names)
    groups: dict[str, str] = {}
    for shards in task.known:
        index = index_shards(shards, needs=(METADATA_EXTENSION,))
        for number in range(len(index)):
            try:
                about = Members(index[number]).metadata()
            except BadSampleError:
                continue  # training and evaluation count these
            label, group = about.get(classes.label_field), about.get(task.field)
            if label not in wanted or not isinstance(group, str):
                continue
            if groups.setdefault(label, group) != group:
                raise ValueError(
                    f"{shards}: {label!r} is of {task.field} {group!r}, and elsewhere of "
                    f"{groups[label]!r}"
                )
    return groups


def group_error(run: Path, task: GroupTask, *, batch_size: int, workers: int) -> tuple[float, int]:
    """Share of the images that a trained model puts into a wrong group, and how many there are.

    Raises:
        FileNotFoundError, ValueError: see `load_trained` and `label_groups`; or no image can
            be read, or one has a label without a group.
    """
    model, _ = load_trained(run)
    evaluator = Evaluator(
        model=model,
        tokenizer=Tokenizer(context_length=model.config.text.context_length),
        runtime=Runtime.alone(torch.device("cpu")),
        batch_size=batch_size,
        workers=workers,
    )
    classes, groups = load_classes(task.classes), label_groups(task)
    numbers = {group: number for number, group in enumerate(sorted(set(groups.values())))}
    of_label = torch.tensor([numbers.get(groups.get(name, ""), -1) for name in classes.names])
    found = answer_task(
        evaluator,
        ZeroShotTask(name=task.name, shards=task.shards, classes=task.classes, templates=("{}",)),
    )
    right = of_label[found.target]
    if bool((right < 0).any()):
        raise ValueError(f"{task.shards} has an image whose label has no {task.field}")
    wrong = of_label[found.answer] != right
    return float(wrong.double().mean()), len(wrong)
