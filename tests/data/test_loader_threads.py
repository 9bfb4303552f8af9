"""The loader's threads: errors come out of them, and none is left."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.data.config import DataConfig
from fastclip.data.loader import TrainLoader
from fastclip.tokenizer import Tokenizer
from shards import loader_threads, sample, write_shards, write_tar

TOKENIZER = Tokenizer(context_length=32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("threads"), pairs=40, per_shard=16)


def make(train: Path, batch_size: int = 4, **options: Any) -> TrainLoader:
    return TrainLoader(
        DataConfig(train=str(train), **options),
        image_size=24,
        tokenizer=TOKENIZER,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        seed=0,
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_in_a_thread_reaches_the_consumer(
    shards: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    calls = []

    def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(texts)
        if len(calls) > 6:
            raise OSError("the disk is on fire")
        return TOKENIZER.encode_batch(texts)

    loader = make(shards, workers=workers, prefetch_batches=3)
    tokenizer = Tokenizer(context_length=32)
    monkeypatch.setattr(tokenizer, "encode_batch", encode)
    loader.tokenizer = tokenizer
    with pytest.raises(OSError, match="on fire"):
        [next(loader) for _ in range(20)]
    assert loader_threads() == []
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


@pytest.mark.timeout(60)
def test_threads_share_a_batch(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them, though no other batch is being prepared."""
    together = threading.Barrier(3, timeout=20)
    rows = TrainLoader._rows

    def with_others(self: TrainLoader, *arguments: Any) -> Any:
        together.wait()
        return rows(self, *arguments)

    monkeypatch.setattr(TrainLoader, "_rows", with_others)
    with make(shards, batch_size=36, workers=3, prefetch_batches=1) as loader:
        assert len(next(loader)) == 36


@pytest.mark.timeout(60)
def test_shards_that_vanish_end_the_run_and_do_not_hang_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [sample(number) for number in range(8)])
    with make(path, max_bad_fraction=1.0) as loader:
        path.unlink()
        with pytest.raises(ValueError, match=r"100 samples in a row cannot be used .*unreadable"):
            next(loader)
    assert loader_threads() == []


def test_closing_joins_the_threads(shards: Path) -> None:
    with make(shards, workers=3, prefetch_batches=6) as loader:
        next(loader)
        assert loader_threads()
    assert loader_threads() == []
    loader.close()  # a second time does no harm
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
