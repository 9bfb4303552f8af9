"""`SymmetricRankingLoss` equals sentence-transformers' own loss, and fits into its wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peers  # noqa: F401  transformers must not take our folder `kernels` for another package
from loss_oracles import error

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from fastclip.losses.sentence_transformers import SymmetricRankingLoss


class _Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": self.linear(features["x"])}


@pytest.fixture
def model() -> SentenceTransformer:
    return SentenceTransformer(modules=[_Projection()], device="cpu")


def _result(loss: nn.Module, model: SentenceTransformer, columns: list[Tensor]) -> list[Tensor]:
    value = loss([{"x": column} for column in columns], torch.empty(0))
    return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]


def _theirs(model: SentenceTransformer, **options: Any) -> MultipleNegativesRankingLoss:
    return MultipleNegativesRankingLoss(
        model,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
        **options,
    )


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_loss_and_gradients(model: SentenceTransformer, scale: float) -> None:
    columns = list(torch.randn(2, 9, 6))
    ours = _result(SymmetricRankingLoss(model, scale), model, columns)
    theirs = _result(_theirs(model, scale=scale), model, columns)
    for value, wanted in zip(ours, theirs, strict=True):
        assert error(value, wanted) < 1e-4
    assert error(ours[0], theirs[0]) < 1e-6


def test_inside_matryoshka(model: SentenceTransformer) -> None:
    columns = list(torch.randn(2, 7, 6))
    results = [
        _result(MatryoshkaLoss(model, loss, [8, 4]), model, columns)
        for loss in (SymmetricRankingLoss(model), _theirs(model))
    ]
    for value, wanted in zip(*results, strict=True):
        assert error(value, wanted) < 1e-4


def test_negatives_and_wrong_settings_are_refused(model: SentenceTransformer) -> None:
    loss = SymmetricRankingLoss(model, memory_budget=0)
    with pytest.raises(ValueError, match="two columns, anchor and positive, not 3"):
        _result(loss, model, list(torch.randn(3, 4, 6)))
    with pytest.raises(ValueError, match="positive"):
        SymmetricRankingLoss(model, scale=0.0)
    assert loss.get_config_dict()["memory_budget"] == 0
