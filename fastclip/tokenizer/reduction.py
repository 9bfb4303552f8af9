"""open_clip's ways of shortening a text that has more tokens than a row: drop some at random.

The random numbers are drawn by the same calls as open_clip's, so equal seeds give equal rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

ReductionMask = Literal["", "simple", "random", "shuffle", "syntax"]
"""Which tokens of a text that is too long stay: the first ("" – plain truncation), a random block
(simple), a random choice in order (random) or out of order (shuffle), nouns before adjectives
before verbs before the rest (syntax)."""


def check_reduction(mask: str) -> None:
    """Raises ValueError for an unknown mask, ImportError for "syntax" without nltk."""
    if mask not in get_args(ReductionMask):
        known = ", ".join(map(repr, get_args(ReductionMask)))
        raise ValueError(f"unknown reduction mask {mask!r}; it is one of {known}")
    if mask == "syntax":
        try:
            import nltk  # pyright: ignore[reportMissingImports]  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'reduction_mask="syntax" tags words with nltk: pip install nltk'
            ) from error


def reduce_batch(
    texts: Sequence[str], mask: ReductionMask, room: int, encode: Callable[[str], list[int]]
) -> list[list[int]]:
    """At most `room` ids of each text, without SOT and EOT."""
    if mask == "syntax":
        # The words are chosen before they are encoded; a word may still be several tokens.
        return [encode(text)[:room] for text in [_most_telling(text, room) for text in texts]]
    # All are encoded before a number is drawn, as there: the order of calls is the same.
    reduced = []
    for ids in [encode(text) for text in texts]:
        excess = len(ids) - room
        if excess <= 0:
            reduced.append(ids)
        elif mask == "simple":
            start = random.randint(0, excess)
            reduced.append(ids[start : start + room])
        else:
            kept = torch.randperm(len(ids))[:room]
            reduced.append([ids[i] for i in (kept if mask == "shuffle" else kept.msort()).tolist()])
    return reduced


def _most_telling(text: str, count: int) -> str:
    """The `count` words of a text that say most by their part of speech, in their order."""
    import nltk  # pyright: ignore[reportMissingImports]
    import numpy as np

    words = nltk.tokenize.word_tokenize(text)
    ranks = [_rank(tag) for _, tag in nltk.pos_tag(words)]
    # NumPy's own order of equal ranks decides which of them are cut, as in open_clip.
    kept = sorted(np.argsort(np.array(ranks))[:count].tolist())
    return " ".join(words[place] for place in kept)


def _rank(tag: str) -> int:
    for rank, beginning in enumerate(("NN", "JJ", "VB"), start=1):
        if tag.startswith(beginning):
            return rank
    return 4
