"""Zero-shot classification by each objective.

The CLIP paper does not say how the predictive ones of its Figure 2 classify. Here, fixed before any
result was seen:

``language_model``
    The class whose prompt the decoder finds most probable, log p(prompt | image), end of text
    included. Variants: ``mean``, the same divided by the prompt's tokens; ``corrected``, minus log
    p(prompt) under the mean of all images' features, so that common names have no advantage.
``bag_of_words``
    The mean of the log-probabilities of the prompt's words. Variants: ``sum``; ``corrected``, minus
    the same under the mean feature.
the contrastive ones
    The cosine, as in CLIP.

Each class has one prompt, its bare name, as captions are such. All images are scored against all
classes; top-1 and top-5 of the language model are exact by branch and bound (`prompt_trie`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.data.eval_loader import eval_batches
from fastclip.data.index import METADATA_EXTENSION, index_shards
from fastclip.data.remote import shown
from fastclip.eval.zero_shot import ZeroShotTask, load_classes, rank_of_target
from fastclip.experiments.objective_models import (
    BagOfWordsHead,
    LanguageModelHead,
    ObjectiveModel,
    Vocabulary,
    bags_of_words,
)
from fastclip.experiments.prompt_trie import PromptScore, PromptTrie, ranks_under_language_model
from fastclip.tokenizer import Tokenizer

_TOP = 5
_BATCH = 256


@dataclass(frozen=True)
class LoadedTask:
    """A zero-shot task in memory."""

    name: str
    images: Tensor
    """uint8 [B, 3, R, R]"""

    target: Tensor
    """int64 [B]"""

    tokens: Tensor
    """int64 [C, L], the classes' prompts in ids of the vocabulary."""

    lengths: Tensor
    """int32 [C], start and end of text included."""


def load_task(
    task: ZeroShotTask, *, image_size: int, tokenizer: Tokenizer, vocabulary: Vocabulary
) -> LoadedTask:
    """Read the images of `task`, and the bare names of its classes.

    Raises:
        FileNotFoundError, ValueError: as `load_classes` and `index_shards`; or no image was read.
    """
    classes = load_classes(task.classes)
    images, targets = [], []
    for batch in eval_batches(
        index_shards(task.shards, needs=(METADATA_EXTENSION,)),
        image_size=image_size,
        batch_size=_BATCH,
        workers=1,
    ):
        images.append(batch.images)
        targets.append(classes.index(batch, shown(task.shards)))
    if not sum(map(len, images)):
        raise ValueError(f"zero-shot task {task.name}: no image of {shown(task.shards)} was read")
    tokens, lengths = tokenizer.encode_batch(classes.names)
    tokens = vocabulary(tokens, lengths)[:, : int(lengths.max())]
    return LoadedTask(task.name, torch.cat(images), torch.cat(targets), tokens, lengths)


@torch.no_grad()
def classify(
    model: ObjectiveModel, tasks: Sequence[LoadedTask], *, variants: bool
) -> dict[str, float]:
    """Fractions ``TASK/top1`` and ``TASK/top5``; with `variants` also ``TASK/VARIANT/top1``, ….

    The model is in evaluation mode.
    """
    results: dict[str, float] = {}
    for task in tasks:
        for variant, ranks in _ranks(model, task, variants).items():
            name = f"{task.name}/{variant}/" if variant else f"{task.name}/"
            for top in (1, _TOP):
                results[f"{name}top{top}"] = float((ranks < top).double().mean())
    return results


def _ranks(model: ObjectiveModel, task: LoadedTask, variants: bool) -> dict[str, Tensor]:
    """Ranks of the right classes, capped at 5, by variant; "" is the score fixed in advance."""
    features = torch.cat([model.visual(part) for part in task.images.split(_BATCH)])
    tokens, lengths, head = task.tokens, task.lengths, model.head
    if isinstance(head, LanguageModelHead):
        return language_model_ranks(head, features, task, variants=variants)
    if isinstance(head, BagOfWordsHead):
        scores = bag_of_words_scores(head, features, tokens, lengths)
    else:
        scores = {"": head.embed_images(features) @ head.embed_texts(tokens, lengths).T}
    return {
        name: rank_of_target(value, task.target)
        for name, value in scores.items()
        if variants or not name
    }


def bag_of_words_scores(
    head: BagOfWordsHead, features: Tensor, tokens: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """Scores [B, C] by variant; `tokens` and `lengths` are the prompts'."""
    bags = bags_of_words(tokens, lengths, head.words.out_features)
    words = head.log_probabilities(features)
    prior = head.log_probabilities(features.mean(dim=0, keepdim=True))
    mean = words @ bags.T
    return {"": mean, "sum": mean * (lengths - 2), "corrected": mean - prior @ bags.T}


def prompt_log_probabilities(
    head: LanguageModelHead, features: Tensor, tokens: Tensor, lengths: Tensor
) -> Tensor:
    """log p of row i's prompt for row i's features, fp32 [B]; one row of features serves all."""
    results = []
    for first in range(0, len(tokens), _BATCH):
        rows = slice(first, first + _BATCH)
        own = features[rows] if len(features) > 1 else features.expand(len(tokens[rows]), -1)
        results.append(head.log_probabilities(own, tokens[rows], lengths[rows]).sum(dim=1))
    return torch.cat(results)


def language_model_scores(
    head: LanguageModelHead, features: Tensor, tokens: Tensor, lengths: Tensor
) -> dict[str, PromptScore]:
    """How each variant scores a class; `features` are all images', [B, embed_dim]."""
    ones, zeros = torch.ones(len(tokens)), torch.zeros(len(tokens))
    prior = prompt_log_probabilities(head, features.mean(dim=0, keepdim=True), tokens, lengths)
    return {
        "": PromptScore(ones, zeros),
        "mean": PromptScore(1 / (lengths - 1).float(), zeros),
        "corrected": PromptScore(ones, -prior),
    }


def language_model_ranks(
    head: LanguageModelHead,
    features: Tensor,
    task: LoadedTask,
    *,
    variants: bool = True,
    limit: int = _TOP,
) -> dict[str, Tensor]:
    """Ranks of the right classes, int64 [B], at most `limit`, by variant."""
    tokens, lengths = task.tokens, task.lengths
    right = prompt_log_probabilities(head, features, tokens[task.target], lengths[task.target])
    scores = language_model_scores(head, features, tokens, lengths)
    prompts = [
        row[1 : length - 1] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
    trie = PromptTrie(prompts, end=head.token_embedding.num_embeddings - 1)
    return {
        name: ranks_under_language_model(
            head, features, trie, right, task.target, score, limit=limit
        )
        for name, score in scores.items()
        if variants or not name
    }
