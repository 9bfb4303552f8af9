"""The five heads: their losses by hand, padding, and what they have in common."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.experiments.objective_models import (
    OBJECTIVES,
    PREFIX_TOKENS,
    BagOfWordsHead,
    ContinuousBagOfWords,
    ContrastiveHead,
    ConvirtHead,
    LanguageModelHead,
    Objective,
    ObjectiveModel,
    Vocabulary,
    bags_of_words,
    convirt_augment,
    weighted_contrastive_loss,
)
from fastclip.losses import clip_loss
from fastclip.models.config import ClipConfig, TextConfig
from fastclip.models.presets import preset

VOCABULARY = 12
START, END = 10, 11
TEXTS = ((1, 2, 3), (4,), (), (5, 5, 6, 7))


def _config() -> ClipConfig:
    return dataclasses.replace(
        preset("RN-Nano"),
        embed_dim=16,
        text=TextConfig(context_length=10, vocab_size=50, width=32, heads=2, layers=2),
    )


def _rows(width: int) -> tuple[Tensor, Tensor]:
    rows = torch.zeros(len(TEXTS), width, dtype=torch.int64)
    for row, text in zip(rows, TEXTS, strict=True):
        row[: len(text) + 2] = torch.tensor([START, *text, END])
    return rows, torch.tensor([len(text) + 2 for text in TEXTS], dtype=torch.int32)


def _model(objective: Objective) -> ObjectiveModel:
    torch.manual_seed(5)
    return ObjectiveModel(objective, _config(), VOCABULARY)


def test_vocabulary_numbers_what_occurs() -> None:
    vocabulary = Vocabulary(torch.tensor([[40, 7, 7, 49]]), 50)
    assert vocabulary.size == 4
    rows = torch.tensor([[40, 7, 8, 49, 7], [40, 49, 49, 49, 49]], dtype=torch.int32)
    result = vocabulary(rows, torch.tensor([4, 2]))
    assert result.tolist() == [[2, 1, 0, 3, 0], [2, 3, 0, 0, 0]]
    assert result.argmax(dim=1).tolist() == [3, 1]  # the end of text is the largest


def test_one_seed_gives_all_objectives_one_tower() -> None:
    states = [_model(objective).visual.state_dict() for objective in OBJECTIVES]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_language_model_loss_is_torch_cross_entropy_of_each_token() -> None:
    head = LanguageModelHead(_config(), VOCABULARY)
    features, (tokens, lengths) = torch.randn(len(TEXTS), 16), _rows(8)
    losses = []
    for feature, text in zip(features, TEXTS, strict=True):
        embedded = head.token_embedding(torch.tensor([text], dtype=torch.int64))
        x = torch.cat([head.prefix_tokens(feature[None]), embedded], dim=1)
        x = x + head.positional_embedding[: x.shape[1]]
        for block in head.decoder_blocks():
            x = block(x)
        logits = head.ln_final(x[0, PREFIX_TOKENS - 1 :]) @ head.token_embedding.weight.T
        losses.append(F.cross_entropy(logits, torch.tensor([*text, END]), reduction="none"))
    loss = head(features, tokens, lengths, torch.arange(len(TEXTS)))
    torch.testing.assert_close(loss, torch.cat(losses).mean())


def test_language_model_sees_no_later_token() -> None:
    head = LanguageModelHead(_config(), VOCABULARY)
    features, (tokens, lengths) = torch.randn(len(TEXTS), 16), _rows(8)
    changed = tokens.clone()
    changed[3, 4] = 9  # its fourth word
    before = head.log_probabilities(features, tokens, lengths)[3]
    after = head.log_probabilities(features, changed, lengths)[3]
    torch.testing.assert_close(before[:3], after[:3])
    assert not torch.isclose(before[3:5], after[3:5]).any()


def test_bags() -> None:
    tokens, lengths = _rows(9)
    bags = bags_of_words(tokens, lengths, VOCABULARY)
    assert bags[:, [0, START, END]].sum() == 0
    torch.testing.assert_close(bags[0, 1:4], torch.full((3,), 1 / 3))
    assert bags[1].tolist() == [0.0] * 4 + [1.0] + [0.0] * 7
    assert bags[2].sum() == 0
    assert bags[3, 5:8].tolist() == [0.5, 0.25, 0.25]


def test_bag_of_words_loss_is_the_expectation_over_words() -> None:
    head = BagOfWordsHead(_config(), VOCABULARY)
    features, (tokens, lengths) = torch.randn(len(TEXTS), 16), _rows(8)
    total = torch.zeros(())
    for feature, text in zip(features, TEXTS, strict=True):
        for word in text:
            total += F.cross_entropy(head.words(feature), torch.tensor(word)) / len(text)
    loss = head(features, tokens, lengths, torch.arange(len(TEXTS)))
    torch.testing.assert_close(loss, total / len(TEXTS))


def test_continuous_bag_is_the_mean_of_words() -> None:
    text = ContinuousBagOfWords(_config(), VOCABULARY)
    tokens, lengths = _rows(8)
    expected = text.proj(text.token_embedding.weight[[5, 5, 6, 7]].mean(dim=0))
    features = text(tokens, lengths)
    torch.testing.assert_close(features[3], expected)
    assert features[2].tolist() == [0.0] * 16


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_changes_nothing(objective: Objective) -> None:
    model = _model(objective)
    features, ids = torch.randn(len(TEXTS), 16), torch.tensor([0, 1, 2, 1])
    losses = [model.head(features, *_rows(width), ids) for width in (6, 10)]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_learns(objective: Objective) -> None:
    model = _model(objective).train()
    tokens, lengths = _rows(8)
    images = torch.randint(0, 256, (len(TEXTS), 3, 64, 64), dtype=torch.uint8)
    for name, parameter in model.named_parameters():  # new bottlenecks are identities
        if name.endswith("bn3.weight"):
            torch.nn.init.ones_(parameter)
    model(images, tokens, lengths, torch.arange(len(TEXTS))).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_clip_is_the_clip_loss_with_positives_by_label() -> None:
    head = _model("transformer_contrastive").head
    assert isinstance(head, ContrastiveHead)
    features, ids = torch.randn(len(TEXTS), 16), torch.tensor([0, 1, 2, 1])
    tokens, lengths = _rows(8)
    expected = clip_loss(
        head.embed_images(features), head.embed_texts(tokens, lengths), 1 / 0.07, ids=ids
    )
    torch.testing.assert_close(head(features, tokens, lengths, ids), expected)


def test_weighted_loss() -> None:
    images, texts = (F.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    ids = torch.tensor([0, 1, 2, 1, 0, 3])
    logits = images @ texts.T / 0.1
    even = weighted_contrastive_loss(logits, ids, image_to_text=0.5)
    torch.testing.assert_close(even, clip_loss(images, texts, 10.0, ids=ids))
    one = weighted_contrastive_loss(logits, torch.arange(6), image_to_text=1.0)
    torch.testing.assert_close(one, F.cross_entropy(logits, torch.arange(6)))


def test_convirt_has_hidden_layers_and_a_fixed_temperature() -> None:
    head = _model("convirt").head
    assert isinstance(head, ConvirtHead)
    features, ids = torch.randn(len(TEXTS), 16), torch.arange(len(TEXTS))
    tokens, lengths = _rows(8)
    images = F.normalize(head.image[1](features.relu()), dim=1)
    logits = images @ head.embed_texts(tokens, lengths).T / 0.1
    expected = 0.75 * F.cross_entropy(logits, ids) + 0.25 * F.cross_entropy(logits.T, ids)
    torch.testing.assert_close(head(features, tokens, lengths, ids), expected)
    assert not [name for name, _ in head.named_parameters() if "scale" in name]
    assert [type(layer).__name__ for layer in head.text.proj.children()] == [
        "Linear", "ReLU", "Linear",
    ]  # fmt: skip


def test_augmentation_flips_and_changes_brightness_of_each_image() -> None:
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[..., :4] = 120
    changed = convirt_augment(image.expand(200, -1, -1, -1), torch.Generator().manual_seed(1))
    again = convirt_augment(image.expand(200, -1, -1, -1), torch.Generator().manual_seed(1))
    assert torch.equal(changed, again)
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 255
    flipped = changed[..., 0].mean(dim=(1, 2)) < changed[..., -1].mean(dim=(1, 2))
    assert 60 < int(flipped.sum()) < 140
    means = changed.mean(dim=(1, 2, 3))
    assert 60 * 0.6 - 0.1 <= float(means.min()) < 45  # contrast keeps the mean, or clamps at 0
    assert float(means.max()) > 75
    assert len(means.unique()) > 190


def test_a_transformer_as_image_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="on a ResNet"):
        ObjectiveModel("convirt", preset("ViT-Nano-8"), VOCABULARY)
