"""Evaluation batches: every sample once, as many batches on every rank."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastclip.data import eval_loader
from fastclip.data.eval_loader import eval_batches
from fastclip.data.index import index_shards
from shards import evaluation_pixels, sample, write_shards, write_tar


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_and_ranks_in_step(tmp_path: Path, world_size: int) -> None:
    index = index_shards(str(write_shards(tmp_path, pairs=19, per_shard=7)))
    streams = [
        list(
            eval_batches(
                index,
                image_size=16,
                batch_size=4,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(stream) for stream in streams}) == 1
    keys = [key for stream in streams for batch in stream for key in batch.keys]
    assert sorted(keys) == [sample(number)[0] for number in range(19)]
    for batch in (batch for stream in streams for batch in stream):
        assert batch.images.shape == (len(batch.keys), 3, 16, 16)
        assert len(batch.metadata) == len(batch.numbers) == len(batch)


def test_pixels_are_the_centre(tmp_path: Path) -> None:
    index = index_shards(str(write_shards(tmp_path, pairs=2)))
    (batch,) = eval_batches(index, image_size=16, batch_size=4)
    expected = evaluation_pixels(sample(1)[1]["png"], 16)
    assert np.array_equal(batch.images[1].permute(1, 2, 0).numpy(), expected)
    assert batch.images.dtype == torch.uint8


def test_damage_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [sample(number) for number in range(5)]
    rows[2][1]["png"] = b"broken"
    index = index_shards(str(write_tar(tmp_path / "a.tar", rows)))
    batches = list(eval_batches(index, image_size=16, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 1, 1]
    assert "left out 1 sample(s): {'broken image': 1}" in caplog.text


def test_images_without_captions(tmp_path: Path) -> None:
    rows = [(key, {"png": members["png"]}) for key, members in map(sample, range(3))]
    index = index_shards(str(write_tar(tmp_path / "a.tar", rows)), needs=())
    (batch,) = eval_batches(index, image_size=16, batch_size=8)
    assert batch.keys == tuple(key for key, _ in rows)
    assert batch.metadata == ({}, {}, {})


def _loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("fastclip-eval")]


def test_ranks_without_samples_give_empty_batches(tmp_path: Path) -> None:
    index = index_shards(str(write_shards(tmp_path, pairs=5)))
    streams = [
        list(eval_batches(index, image_size=16, batch_size=2, rank=rank, world_size=4))
        for rank in range(4)
    ]
    assert [[len(batch) for batch in stream] for stream in streams] == [[2], [2], [1], [0]]
    (empty,) = streams[3]
    assert empty.images.shape == (0, 3, 16, 16)
    assert empty.images.dtype == torch.uint8
    assert empty.keys == empty.metadata == empty.numbers == ()


def test_a_batch_of_damaged_samples_is_empty_and_still_counts(tmp_path: Path) -> None:
    rows = [sample(number) for number in range(6)]
    for number in (2, 3):
        rows[number][1]["png"] = b"broken"
    index = index_shards(str(write_tar(tmp_path / "a.tar", rows)))
    batches = list(eval_batches(index, image_size=16, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 0, 2]
    assert [key for batch in batches for key in batch.keys] == [rows[n][0] for n in (0, 1, 4, 5)]


@pytest.mark.parametrize("workers", [1, 4])
def test_order_and_content_are_those_of_the_shards(tmp_path: Path, workers: int) -> None:
    index = index_shards(str(write_shards(tmp_path, pairs=19, per_shard=7)))
    batches = eval_batches(index, image_size=16, batch_size=3, workers=workers)
    number = 0
    for batch in batches:
        for row, key in enumerate(batch.keys):
            expected_key, members = sample(number)
            assert key == expected_key
            assert index[batch.numbers[row]].key == key
            assert batch.metadata[row] == json.loads(members["json"])
            expected = evaluation_pixels(members["png"], 16)
            assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), expected)
            number += 1
    assert number == 19


@pytest.mark.timeout(60)
def test_an_error_reaches_the_consumer_and_the_threads_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_shards(str(write_shards(tmp_path, pairs=12)))

    def fail(width: int, height: int) -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(eval_loader, "centre_crop", fail)
    with pytest.raises(OSError, match="on fire"):
        list(eval_batches(index, image_size=16, batch_size=1))
    assert _loader_threads() == []


@pytest.mark.timeout(60)
def test_leaving_early_ends_the_threads(tmp_path: Path) -> None:
    index = index_shards(str(write_shards(tmp_path, pairs=12)))
    batches = eval_batches(index, image_size=16, batch_size=1)
    next(batches)
    assert _loader_threads()
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    assert _loader_threads() == []
