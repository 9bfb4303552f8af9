"""Retrieval: the right text among all texts of a set, the right image among all its images.

As in arXiv 2103.00020, Table 13: an image may have several captions (five in Flickr30k and COCO).
For an image each of them is right, and each of them is asked with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.data.decode import BadSampleError
from fastclip.data.index import ShardIndex, index_shards
from fastclip.data.quarantine import Quarantine
from fastclip.data.reader import caption_id, check_caption_key, read_captions
from fastclip.data.remote import shown
from fastclip.distributed.collectives import all_gather_objects, all_gather_rows
from fastclip.distributed.runtime import Runtime
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.prompts import check_templates, fill
from fastclip.eval.texts import text_features
from fastclip.ops.similarity import similarity

logger = logging.getLogger("fastclip")

RECALL_AT = (1, 5, 10)

DIRECTIONS = ("image_to_text", "text_to_image")

RECALL_HEADS = (
    *("images", "texts"),
    *(f"{found} R@{k}" for found in ("text", "image") for k in RECALL_AT),
)
"""Of a table's columns that `recall_cells` fills."""

NEVER = 2**62
"""A rank behind every other."""

_CHUNK_SCORES = 2**24  # scores in memory at once: 64 MiB


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """Images and captions that are to find each other again."""

    name: str
    """Short name, the key of the results."""

    shards: str
    """Shards with images and captions; see `expand_shards`."""

    caption_key: str = "txt"
    """Where the captions are, as in `DataConfig`; each text of a list is one."""

    caption_lines: bool = False
    """Whether each line of a text is a caption of its own."""

    template: str = "{}"
    """What texts are asked with, {} for the caption; the paper has "a photo of {}"."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"a retrieval task's name is not empty and has no /: {self.name!r}")
        check_caption_key(self.caption_key, f"caption_key of retrieval task {self.name}")
        check_templates([self.template], f"template of retrieval task {self.name}")

    def captions(self, texts: Sequence[str]) -> list[str]:
        """The captions in a sample's texts."""
        if not self.caption_lines:
            return list(texts)
        return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def best_ranks(queries: Tensor, candidates: Tensor, right: Tensor) -> Tensor:
    """For each query, how many wrong candidates score at least as high as its best right one.

    The score matrix is never whole in memory.

    Args:
        queries: [Q, D] unit-length features.
        candidates: [N, D] unit-length features.
        right: int64 [P, 2], each query with each candidate that is right for it; ordered by query.

    Returns:
        int64 [Q]; ties count against the model. A score that is not a number is never a right
        one's; where no other is, the rank is `NEVER`.
    """
    ranks = [torch.zeros(0, dtype=torch.int64, device=queries.device)]
    rows = max(1, _CHUNK_SCORES // max(len(candidates), 1))
    begins = torch.arange(0, len(queries) + rows, rows, device=right.device)
    bounds = torch.searchsorted(right[:, 0].contiguous(), begins).tolist()
    for chunk, begin in enumerate(range(0, len(queries), rows)):
        scores = similarity(queries[begin : begin + rows], candidates, normalize=False)
        query, candidate = right[bounds[chunk] : bounds[chunk + 1]].unbind(1)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[query - begin, candidate] = True
        unusable = ~is_right | scores.isnan()
        best = scores.masked_fill(unusable, -torch.inf).amax(dim=1, keepdim=True)
        wrong = (~(scores < best) & ~is_right).sum(dim=1)
        ranks.append(wrong.masked_fill(unusable.all(dim=1), NEVER))
    return torch.cat(ranks)


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images of an index that could be used, the same on every rank."""

    index: ShardIndex

    numbers: Sequence[int]
    """Their places in the index."""

    features: Tensor
    """fp32 [I, D], of unit length, on the runtime's device."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A task's images and texts, the same on every rank."""

    images: Images

    captions: list[str]
    """The different ones, first come first."""

    texts: Tensor
    """fp32 [T, D], of the captions, of unit length, on the runtime's device."""

    count: int
    """Of captions, each image's counted by itself."""

    right: Tensor
    """int64 [P, 2] on that device, each image with each of its captions; ordered by image."""

    def by_text(self) -> Tensor:
        """int64 [P, 2], each caption with each of its images; ordered by caption."""
        return self.right.flip(1)[self.right[:, 1].argsort(stable=True)]


def embed_images(evaluator: Evaluator, index: ShardIndex) -> Images:
    """The features that images are to be found by; collective."""
    parts = []
    numbers: list[int] = []
    for batch in evaluator.batches(index):
        parts.append(evaluator.image_features(batch))
        numbers += batch.numbers
    everyone = all_gather_objects(numbers)
    features = all_gather_rows(torch.cat(parts), [len(own) for own in everyone])
    return Images(
        index=index, numbers=[number for own in everyone for number in own], features=features
    )


def embed_pairs(evaluator: Evaluator, task: RetrievalTask, images: Images) -> Pairs:
    """The features that images and texts are to find each other by; collective.

    Captions that differ in case and spacing alone, which the tokenizer evens out, are one text, and
    computed once. An image without a caption is counted and left out.

    Raises:
        ValueError: no image has a caption.
    """
    everyone = _read_captions(evaluator.runtime, task, images)
    captioned = [row for row, captions in enumerate(everyone) if captions]
    if not captioned:
        raise ValueError(
            f"retrieval task {task.name}: no image of {shown(task.shards)} could be read and has a "
            f"caption under {task.caption_key}"
        )
    places: dict[int, int] = {}
    distinct: list[str] = []
    right: dict[tuple[int, int], None] = {}  # a set in order
    for image, row in enumerate(captioned):
        for caption in everyone[row]:
            place = places.setdefault(caption_id(caption), len(distinct))
            if place == len(distinct):
                distinct.append(caption)
            right[image, place] = None
    return Pairs(
        images=Images(
            index=images.index,
            numbers=[images.numbers[row] for row in captioned],
            features=images.features[captioned],
        ),
        captions=distinct,
        count=sum(map(len, everyone)),
        texts=text_features(evaluator, [fill([task.template], each)[0] for each in distinct]),
        right=torch.tensor(list(right), dtype=torch.int64, device=evaluator.runtime.device),
    )


def _read_captions(runtime: Runtime, task: RetrievalTask, images: Images) -> list[list[str]]:
    """The captions of each image, none where there is none that can be used."""
    bad = Quarantine()
    own: list[list[str]] = []
    for number in images.numbers[runtime.rank :: runtime.world_size]:
        sample = images.index[number]
        try:
            texts = read_captions(sample, task.caption_key)
        except BadSampleError as error:
            bad.bad(sample, error)
            texts = []
        own.append(task.captions(texts))
    if bad.total:
        where = f"retrieval task {task.name}, {shown(task.shards)}"
        logger.warning("%s: left out %d sample(s): %s", where, bad.total, dict(bad.counts))
    found: list[list[str]] = [[] for _ in images.numbers]
    for rank, part in enumerate(all_gather_objects(own)):
        found[rank :: runtime.world_size] = part
    return found


def recall(pairs: Pairs, runtime: Runtime) -> dict[str, float]:
    """What `retrieval` returns, of these pairs; collective."""
    asked = (
        (pairs.images.features, pairs.texts, pairs.right),
        (pairs.texts, pairs.images.features, pairs.by_text()),
    )
    hits = []
    for queries, candidates, right in asked:  # each rank asks its share of the questions
        own = right[right[:, 0] % runtime.world_size == runtime.rank]
        own = torch.stack([own[:, 0] // runtime.world_size, own[:, 1]], dim=1)
        ranks = best_ranks(queries[runtime.rank :: runtime.world_size], candidates, own)
        hits.append([int((ranks < k).sum()) for k in RECALL_AT])
    everyone = all_gather_objects(hits)
    counts = {"images": len(pairs.images.features), "texts": len(pairs.texts)}
    result = {
        f"{name}_r{k}": sum(hit[direction][place] for hit in everyone) / total
        for direction, (name, total) in enumerate(zip(DIRECTIONS, counts.values(), strict=True))
        for place, k in enumerate(RECALL_AT)
    }
    counts["captions"] = pairs.count
    return {**result, **{name: float(count) for name, count in counts.items()}}


def retrieval(evaluator: Evaluator, task: RetrievalTask) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions; collective, the same result on every rank.

    A question is answered where one of the first so many answers is right. Equal captions, whatever
    their case and spacing, are one text: any of its images is right for it, and it is right for
    each of them.

    Returns:
        ``image_to_text_r1`` …, ``text_to_image_r10`` as fractions, and the numbers of ``images``,
        of their ``captions`` and of different ``texts`` among these.

    Raises:
        FileNotFoundError, ValueError: see `index_shards` and `embed_pairs`.
    """
    images = embed_images(evaluator, index_shards(task.shards, needs=()))
    return recall(embed_pairs(evaluator, task, images), evaluator.runtime)


def recall_cells(numbers: Mapping[str, float]) -> list[str]:
    """What `retrieval` returns, for a table."""
    return [
        *(f"{numbers[name]:,.0f}" for name in ("images", "texts")),
        *(f"{numbers[f'{way}_r{k}']:.2%}" for way in DIRECTIONS for k in RECALL_AT),
    ]
