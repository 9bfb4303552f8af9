"""Recall against a plain computation over the whole score matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from evaluating import evaluator
from fastclip.distributed.runtime import Runtime
from fastclip.eval import retrieval as module
from fastclip.eval.retrieval import RetrievalTask, best_ranks, retrieval
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from ranks import run_ranks
from shards import write_shards

ALONE = Runtime.alone(torch.device("cpu"))


def _evaluate(runtime: Runtime, folder: Path, batch_size: int) -> dict[str, float]:
    torch.manual_seed(5)
    model = Clip(preset("ViT-Nano-8")).eval()
    with torch.no_grad():
        return retrieval(
            evaluator(model, runtime, batch_size=batch_size),
            RetrievalTask(name="shapes", shards=str(folder / "shards")),
        )


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(tmp_path: Path, world_size: int) -> None:
    write_shards(tmp_path, pairs=31, per_shard=16)
    alone = _evaluate(ALONE, tmp_path, 6)
    assert alone["images"] == 31
    assert alone["texts"] == 24
    assert 0 < alone["image_to_text_r10"] < 1
    assert run_ranks(_evaluate, world_size, tmp_path, tmp_path, 6) == [alone] * world_size


@pytest.mark.parametrize("chunk", [1, 50, 2**24])
def test_best_ranks_equal_a_sort(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_SCORES", chunk)
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(17, 6, generator=generator), dim=1)
    candidates = F.normalize(torch.randn(23, 6, generator=generator), dim=1)
    groups = torch.randint(0, 5, (23,), generator=generator)
    right = torch.randint(0, 5, (17,), generator=generator)
    expected = []
    for query, group in zip(queries, right, strict=True):
        order = (candidates @ query).argsort(descending=True).tolist()
        first = next(i for i, place in enumerate(order) if groups[place] == group)
        expected.append(first)  # everything before the first right one is wrong
    assert best_ranks(queries, candidates, right, groups).tolist() == expected


def test_collapsed_features_find_nothing() -> None:
    same = torch.ones(4, 3)
    numbers = torch.arange(4)
    assert best_ranks(same, same, numbers, numbers).tolist() == [3, 3, 3, 3]
