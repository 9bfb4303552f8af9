"""Classification by each objective against brute force."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.eval.zero_shot import rank_of_target
from fastclip.experiments.objective_models import BagOfWordsHead, LanguageModelHead
from fastclip.experiments.objective_scoring import (
    LoadedTask,
    bag_of_words_scores,
    language_model_ranks,
    language_model_scores,
    prompt_log_probabilities,
)
from fastclip.experiments.prompt_trie import PromptTrie, _best_of_each
from fastclip.models.config import ClipConfig, TextConfig
from fastclip.models.presets import preset

VOCABULARY = 12
START, END = 10, 11
PROMPTS = (
    (1,), (1, 2), (1, 2, 3, 4), (2,), (2, 2), (3, 1), (3, 1, 5, 6, 7), (3, 1, 5), (4, 4, 4),
    (5,), (6, 7), (7, 6), (8, 9, 1), (8, 9), (9, 9, 9, 9), (2, 3, 4, 5), (1, 1), (4,), (0, 3),
)  # fmt: skip


def _config() -> ClipConfig:
    return dataclasses.replace(
        preset("RN-Nano"),
        embed_dim=16,
        text=TextConfig(context_length=10, width=32, heads=2, layers=2),
    )


def _rows(prompts: tuple[tuple[int, ...], ...], width: int = 7) -> tuple[Tensor, Tensor]:
    rows = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt) + 2] = torch.tensor([START, *prompt, END])
    return rows, torch.tensor([len(prompt) + 2 for prompt in prompts], dtype=torch.int32)


def _head(spread: float) -> LanguageModelHead:
    head = LanguageModelHead(_config(), VOCABULARY).eval()
    with torch.no_grad():  # sharper distributions than a new model's
        head.token_embedding.weight.mul_(spread)
    return head.requires_grad_(False)


def _task(images: int) -> LoadedTask:
    tokens, lengths = _rows(PROMPTS)
    return LoadedTask(
        "t", torch.empty(images, 0), torch.randint(len(PROMPTS), (images,)), tokens, lengths
    )


def _log_p(head: LanguageModelHead, feature: Tensor, prompt: tuple[int, ...]) -> float:
    """One image, one prompt, one forward for each token; no padding, no mask."""
    total = 0.0
    for known, wanted in enumerate([*prompt, END]):
        embedded = head.token_embedding(torch.tensor([prompt[:known]], dtype=torch.int64))
        x = torch.cat([head.prefix_tokens(feature[None]), embedded], dim=1)
        x = x + head.positional_embedding[: x.shape[1]]
        for block in head.decoder_blocks():
            x = block(x)
        total += float(F.log_softmax(head.logits(x[0, -1]), dim=-1)[wanted])
    return total


def test_log_p_of_prompts_is_that_of_brute_force() -> None:
    head, features = _head(20.0), torch.randn(len(PROMPTS), 16)
    expected = [_log_p(head, f, p) for f, p in zip(features, PROMPTS, strict=True)]
    for width in (7, 10):  # padding changes nothing
        tokens, lengths = _rows(PROMPTS, width)
        result = prompt_log_probabilities(head, features, tokens, lengths)
        torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [1.0, 8.0, 30.0])
@pytest.mark.parametrize("limit", [2, 5, 99])
def test_ranks_are_those_of_scoring_everything(spread: float, limit: int) -> None:
    head, task = _head(spread), _task(40)
    features = 3 * torch.randn(40, 16)
    matrix = torch.tensor([[_log_p(head, f, p) for p in PROMPTS] for f in features])
    scores = language_model_scores(head, features, task.tokens, task.lengths)
    ranks = language_model_ranks(head, features, task, limit=limit)
    assert set(ranks) == set(scores) == {"", "mean", "corrected"}
    for name, score in scores.items():
        full = rank_of_target(matrix * score.weight + score.offset, task.target)
        assert ranks[name].tolist() == full.clamp(max=limit).tolist(), name
        assert len(set(full.tolist())) > 5  # good and bad guesses are among them


def test_variants_are_what_they_say() -> None:
    head, features = _head(20.0), torch.randn(5, 16)
    tokens, lengths = _rows(PROMPTS)
    scores = language_model_scores(head, features, tokens, lengths)
    ends = torch.tensor([len(prompt) + 1.0 for prompt in PROMPTS])
    torch.testing.assert_close(scores["mean"].weight, 1 / ends)
    prior = torch.tensor([_log_p(head, features.mean(dim=0), p) for p in PROMPTS])
    torch.testing.assert_close(scores["corrected"].offset, -prior, rtol=1e-4, atol=1e-4)
    assert set(language_model_ranks(head, features, _task(5), variants=False)) == {""}


def test_classes_of_equal_prompts_are_ties() -> None:
    head = _head(20.0)
    tokens, lengths = _rows(((1, 2), (1, 2)))
    task = LoadedTask("t", torch.empty(3, 0), torch.tensor([0, 1, 0]), tokens, lengths)
    for ranks in language_model_ranks(head, torch.randn(3, 16), task).values():
        # To within rounding: each of the two is computed in another way.
        assert set(ranks.tolist()) <= {0, 1}
    assert PromptTrie([(1, 2), (1, 2)], END).levels[2].complete.member.tolist() == [0, 1]


def test_broken_features_are_never_right() -> None:
    head, task = _head(1.0), _task(4)
    for ranks in language_model_ranks(head, torch.full((4, 16), torch.nan), task).values():
        assert ranks.tolist() == [5] * 4


def test_a_beginning_is_a_node_once() -> None:
    trie = PromptTrie(PROMPTS, END)
    assert len(trie) == len({prompt[:n] for prompt in PROMPTS for n in range(len(prompt) + 1)})


def test_best_of_each() -> None:
    group = torch.tensor([4, 2, 4, 2, 4, 2])
    value = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0, 6.0])
    assert _best_of_each(group, value, 2).tolist() == [5, 1, 2, 4]


def test_bag_of_words_scores() -> None:
    head = BagOfWordsHead(_config(), VOCABULARY).requires_grad_(False)
    features = torch.randn(6, 16)
    tokens, lengths = _rows(PROMPTS)
    scores = bag_of_words_scores(head, features, tokens, lengths)
    words = F.log_softmax(head.words(features), dim=-1)
    prior = F.log_softmax(head.words(features.mean(dim=0)), dim=-1)
    for number, prompt in enumerate(PROMPTS):
        own = torch.stack([words[:, word] for word in prompt])
        common = torch.stack([prior[word] for word in prompt])
        torch.testing.assert_close(scores[""][:, number], own.mean(dim=0))
        torch.testing.assert_close(scores["sum"][:, number], own.sum(dim=0))
        torch.testing.assert_close(scores["corrected"][:, number], own.mean(dim=0) - common.mean())
