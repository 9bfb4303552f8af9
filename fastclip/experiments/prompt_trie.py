"""Ranks of class prompts under a language model, exactly, without scoring each against each image.

The prompts of a task form a trie: a node is the beginning of some of them, and is computed once for
an image, by incremental decoding. A class's score is linear in its prompt's log-probability, which
only falls from node to node: a node whose best possible score is below the right class's is left
out with all that stands behind it (branch and bound). The ranks are those of scoring everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.experiments.objective_models import PREFIX_TOKENS, LanguageModelHead
from fastclip.models.attention import attend

_PAIRS = 2048
"""Pairs of an image and a node that are computed at a time: some tens of MB."""

_BEAM = 32
"""Beginnings of each length that the first search keeps; a few settle most images."""


@dataclass(frozen=True)
class PromptScore:
    """A class's score, ``weight * log p(prompt | image) + offset``: fp32 [C] each, weight > 0."""

    weight: Tensor
    offset: Tensor


class _Groups(NamedTuple):
    """Members of each node of a level: those of node n are ``start[n]`` up to ``start[n + 1]``."""

    start: Tensor
    member: Tensor

    @staticmethod
    def of(members: Sequence[Sequence[int]]) -> _Groups:
        start = torch.tensor([0, *map(len, members)]).cumsum(0)
        return _Groups(start, torch.tensor([m for group in members for m in group]).long())

    def expand(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Places in `nodes` and members: an entry for each member of each of the nodes."""
        first = self.start[nodes]
        counts = self.start[nodes + 1] - first
        places = torch.repeat_interleave(torch.arange(len(nodes)), counts)
        within = torch.arange(len(places)) - (counts.cumsum(0) - counts)[places]
        return places, self.member[first[places] + within]

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """The least or largest of the members' values for each node ("min", "max")."""
        return torch.segment_reduce(values[self.member], how, offsets=self.start, axis=0)


@dataclass(frozen=True)
class _Level:
    """All beginnings of one length; the first level is the empty one."""

    tokens: Tensor
    """int64, the last token of each node."""

    children: _Groups
    """Nodes of the next level."""

    complete: _Groups
    """Classes whose prompt is this node."""

    behind: _Groups
    """Classes whose prompt is this node or begins with it."""


class PromptTrie:
    """The prompts of all classes.

    Args:
        prompts: tokens of each class's, without the start and the end of text.
        end: id of the end of text.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], end: int) -> None:
        self.end = end
        self.levels: list[_Level] = []
        nodes: dict[tuple[int, ...], list[int]] = {(): list(range(len(prompts)))}
        depth = 0
        while nodes:
            following: dict[tuple[int, ...], list[int]] = {}
            for node, classes in nodes.items():
                for number in classes:
                    if len(prompts[number]) > depth:
                        longer = (*node, prompts[number][depth])
                        following.setdefault(longer, []).append(number)
            places = {node: place for place, node in enumerate(nodes)}
            children: list[list[int]] = [[] for _ in nodes]
            for place, node in enumerate(following):
                children[places[node[:-1]]].append(place)
            self.levels.append(
                _Level(
                    tokens=torch.tensor([node[-1] if node else end for node in nodes]),
                    children=_Groups.of(children),
                    complete=_Groups.of(
                        [[n for n in group if len(prompts[n]) == depth] for group in nodes.values()]
                    ),
                    behind=_Groups.of(list(nodes.values())),
                )
            )
            nodes, depth = following, depth + 1

    def __len__(self) -> int:
        """Nodes, the empty beginning included."""
        return sum(len(level.tokens) for level in self.levels)


@dataclass(frozen=True)
class _Pairs:
    """Images and nodes of one level under consideration."""

    image: Tensor
    """int64 [P]"""

    node: Tensor
    """int64 [P]"""

    log_p: Tensor
    """fp32 [P], of the node given the image."""

    hidden: Tensor
    """[P, width], what leaves the last block at the node's last token."""

    cache: list[tuple[Tensor, Tensor]]
    """Keys and values of each block, [P, tokens so far, heads, channels]."""


def ranks_under_language_model(
    head: LanguageModelHead,
    features: Tensor,
    trie: PromptTrie,
    right: Tensor,
    target: Tensor,
    score: PromptScore,
    *,
    limit: int,
) -> Tensor:
    """How many other classes score at least as high as the right one, int64 [B], at most `limit`.

    Args:
        features: [B, embed_dim] of the images.
        right: log p of the right class's prompt for each image, fp32 [B].
        target: int64 [B], the right classes.
        limit: an image is done when so many classes have beaten the right one.

    A tie counts against the model, and what is not a number does so `limit` times.
    """
    needed = right * score.weight[target] + score.offset[target]
    # A beam finds the classes that beat a bad guess at a small part of the cost of looking at all;
    # what it does not settle is searched again, and then the bound is a good one.
    beaten = _count_beating(head, features, trie, needed, target, score, limit, beam=_BEAM)
    open_ = (beaten < limit).nonzero().flatten()
    rest = _count_beating(
        head, features[open_], trie, needed[open_], target[open_], score, limit, beam=None
    )
    return beaten.index_copy(0, open_, rest)


def _count_beating(
    head: LanguageModelHead,
    features: Tensor,
    trie: PromptTrie,
    needed: Tensor,
    target: Tensor,
    score: PromptScore,
    limit: int,
    *,
    beam: int | None,
) -> Tensor:
    """How many classes but `target` reach the score `needed`, int64 [B], at most `limit`.

    With `beam`, only among so many beginnings of each length, those with the best bounds.
    """
    beaten = torch.zeros(len(features), dtype=torch.int64)
    weights = [level.behind.reduce(score.weight, "min") for level in trie.levels]
    offsets = [level.behind.reduce(score.offset, "max") for level in trie.levels]
    widest = max(len(level.tokens) for level in trie.levels)
    step = max(1, _PAIRS // min(widest, beam or widest))
    for first in range(0, len(features), step):
        images = torch.arange(first, min(first + step, len(features)))
        pairs = _roots(head, features, images)
        for depth, level in enumerate(trie.levels):
            logits = head.logits(pairs.hidden)
            normaliser = logits.logsumexp(dim=-1)
            # Prompts that end here.
            place, number = level.complete.expand(pairs.node)
            log_p = pairs.log_p[place] + logits[place, trie.end] - normaliser[place]
            image = pairs.image[place]
            reached = log_p * score.weight[number] + score.offset[number]
            beats = ~(reached < needed[image]) & (number != target[image])
            beaten.index_add_(0, image, beats.long())
            if depth + 1 == len(trie.levels):
                break
            # Those that go on.
            place, node = level.children.expand(pairs.node)
            following = trie.levels[depth + 1]
            log_p = pairs.log_p[place] + logits[place, following.tokens[node]] - normaliser[place]
            best = log_p * weights[depth + 1][node] + offsets[depth + 1][node]
            image = pairs.image[place]
            stays = ~(best < needed[image]) & (beaten[image] < limit)
            stays = stays.nonzero().flatten()
            if beam is not None:
                stays = stays[_best_of_each(image[stays], best[stays], beam)]
            if not len(stays):
                break
            place, node, log_p = place[stays], node[stays], log_p[stays]
            pairs = _extend(head, pairs, place, node, log_p, following.tokens[node], depth)
    return beaten.clamp(max=limit)


def _best_of_each(group: Tensor, value: Tensor, count: int) -> Tensor:
    """Places of the `count` largest values of each group, groups in order."""
    order = value.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    _, sizes = group[order].unique_consecutive(return_counts=True)
    begin = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return order[torch.arange(len(order)) - begin < count]


def _roots(head: LanguageModelHead, features: Tensor, images: Tensor) -> _Pairs:
    """The empty beginning of each image: the prefix is computed."""
    x = head.prefix_tokens(features[images]) + head.positional_embedding[:PREFIX_TOKENS]
    cache = []
    for block in head.decoder_blocks():
        query, key, value = block.attn.qkv(block.ln_1(x))
        x = x + block.attn.out(attend(query, key, value, causal=True).flatten(-2))
        x = x + block.mlp(block.ln_2(x))
        cache.append((key, value))
    nowhere = torch.zeros_like(images)
    return _Pairs(images, nowhere, torch.zeros(len(images)), x[:, -1], cache)


def _extend(
    head: LanguageModelHead,
    pairs: _Pairs,
    place: Tensor,
    node: Tensor,
    log_p: Tensor,
    tokens: Tensor,
    depth: int,
) -> _Pairs:
    """One more token behind each of the pairs at `place`."""
    x = head.token_embedding(tokens) + head.positional_embedding[PREFIX_TOKENS + depth]
    cache = []
    for block, (keys, values) in zip(head.decoder_blocks(), pairs.cache, strict=True):
        query, key, value = block.attn.qkv(block.ln_1(x))
        keys = torch.cat([keys[place], key[:, None]], dim=1)
        values = torch.cat([values[place], value[:, None]], dim=1)
        attended = attend(query[:, None], keys, values, causal=False)
        x = x + block.attn.out(attended.flatten(-3))
        x = x + block.mlp(block.ln_2(x))
        cache.append((keys, values))
    return _Pairs(pairs.image[place], node, log_p, x, cache)
