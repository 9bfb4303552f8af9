"""Retrieval: the right text among all texts of a set, the right image among all its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.data.index import (
    CAPTION_EXTENSION,
    METADATA_EXTENSION,
    ShardIndex,
    index_shards,
)
from fastclip.data.remote import shown
from fastclip.distributed.collectives import all_gather_objects, all_gather_rows
from fastclip.distributed.runtime import Runtime
from fastclip.eval.evaluator import Evaluator
from fastclip.ops.similarity import similarity

RECALL_AT = (1, 5, 10)

_CHUNK_SCORES = 2**24  # scores in memory at once: 64 MiB


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """Pairs that are to be found again."""

    name: str
    """Short name, the key of the results."""

    shards: str
    """Shards with images and captions; see `expand_shards`."""

    caption_key: str = "txt"
    """Where the caption is, as in `DataConfig`."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"a retrieval task's name is not empty and has no /: {self.name!r}")


def best_ranks(queries: Tensor, candidates: Tensor, right: Tensor, groups: Tensor) -> Tensor:
    """For each query, how many wrong candidates score at least as high as its best right one.

    The score matrix is never whole in memory.

    Args:
        queries: [Q, D] unit-length features.
        candidates: [N, D] unit-length features.
        right: int64 [Q], the group whose candidates are right for a query.
        groups: int64 [N], the candidates' groups.

    Returns:
        int64 [Q]; ties count against the model, and a score that is not a number is never right.
    """
    ranks = [torch.zeros(0, dtype=torch.int64, device=queries.device)]
    rows = max(1, _CHUNK_SCORES // max(len(candidates), 1))
    for begin in range(0, len(queries), rows):
        scores = similarity(queries[begin : begin + rows], candidates, normalize=False)
        is_right = right[begin : begin + rows, None] == groups
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(scores < best) & ~is_right).sum(dim=1))
    return torch.cat(ranks)


def group_captions(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Each pair's text, where equal captions are one text.

    Returns:
        groups: int64 [N], a text's place among the different captions, first come first.
        first_rows: int64 [texts], the first pair of each.
    """
    places: dict[str, int] = {}
    first_rows = []
    groups = torch.empty(len(captions), dtype=torch.int64)
    for row, caption in enumerate(captions):
        if caption not in places:
            places[caption] = len(places)
            first_rows.append(row)
        groups[row] = places[caption]
    return groups, torch.tensor(first_rows, dtype=torch.int64)


@dataclass(frozen=True)
class Pairs:
    """Features of a task's pairs; on every rank all of them, in the order of the ranks' shares."""

    index: ShardIndex
    images: Tensor
    """fp32 [N, D], of unit length."""

    texts: Tensor
    """fp32 [N, D], of unit length."""

    captions: list[str]
    numbers: list[int]
    """Places in the index."""


def embed_pairs(evaluator: Evaluator, task: RetrievalTask) -> Pairs:
    """The features that pairs are to be found again by; collective.

    Raises:
        ValueError: no pair could be read, or see `index_shards`.
    """
    need = CAPTION_EXTENSION if task.caption_key == "txt" else METADATA_EXTENSION
    index = index_shards(task.shards, needs=(need,))
    image_parts, text_parts = [], []
    captions: list[str] = []
    numbers: list[int] = []
    device = evaluator.runtime.device
    for batch in evaluator.batches(index, caption_key=task.caption_key):
        output = evaluator.model(images=batch.images.to(device), tokens=batch.tokens.to(device))
        image_parts.append(output.image_features)
        text_parts.append(output.text_features)
        captions.extend(batch.captions)
        numbers.extend(batch.numbers)
    everyone: list[tuple[list[str], list[int]]] = all_gather_objects((captions, numbers))
    sizes = [len(own) for own, _ in everyone]
    if not sum(sizes):
        raise ValueError(
            f"retrieval task {task.name}: no pair of {shown(task.shards)} could be read"
        )
    return Pairs(
        index,
        all_gather_rows(torch.cat(image_parts), sizes),
        all_gather_rows(torch.cat(text_parts), sizes),
        [caption for own, _ in everyone for caption in own],
        [number for _, own in everyone for number in own],
    )


def recall(pairs: Pairs, runtime: Runtime) -> dict[str, float]:
    """What `retrieval` returns, of these pairs; collective."""
    images, texts = pairs.images, pairs.texts
    groups, first_rows = (x.to(images.device) for x in group_captions(pairs.captions))
    distinct = texts[first_rows]
    text_groups = torch.arange(len(distinct), device=texts.device)

    # Each rank asks its share of the questions.
    def mine(x: Tensor) -> Tensor:
        return x[runtime.rank :: runtime.world_size]

    image_ranks = best_ranks(mine(images), distinct, mine(groups), text_groups)
    text_ranks = best_ranks(mine(distinct), images, mine(text_groups), groups)
    hits = [[int((ranks < k).sum()) for k in RECALL_AT] for ranks in (image_ranks, text_ranks)]
    everyone = all_gather_objects(hits)
    result: dict[str, float] = {}
    directions = (("image_to_text", len(images)), ("text_to_image", len(distinct)))
    for direction, (name, total) in enumerate(directions):
        for place, k in enumerate(RECALL_AT):
            result[f"{name}_r{k}"] = sum(hit[direction][place] for hit in everyone) / total
    return {**result, "images": float(len(images)), "texts": float(len(distinct))}


def retrieval(evaluator: Evaluator, task: RetrievalTask) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions; collective, the same result on every rank.

    Equal captions are one text: any of its images is right for it, and it is right for each of
    them.

    Returns:
        ``image_to_text_r1`` …, ``text_to_image_r10`` as fractions, and the numbers of ``images``
        and ``texts``.
    """
    return recall(embed_pairs(evaluator, task), evaluator.runtime)
