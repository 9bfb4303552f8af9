"""Evaluation batches: every sample once, as many batches on every rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastclip.data.eval_loader import eval_batches
from fastclip.data.index import index_shards
from fastclip.data.reader import evaluation_pixels
from fastclip.tokenizer import Tokenizer
from shards import sample, write_shards, write_tar

TOKENIZER = Tokenizer(context_length=32)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_and_ranks_in_step(tmp_path: Path, world_size: int) -> None:
    index = index_shards(str(write_shards(tmp_path, pairs=19, per_shard=7)))
    streams = [
        list(
            eval_batches(
                index,
                image_size=16,
                tokenizer=TOKENIZER,
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
        assert len(batch.tokens) == len(batch.lengths) == len(batch.captions) == len(batch)


def test_pixels_are_the_centre(tmp_path: Path) -> None:
    index = index_shards(str(write_shards(tmp_path, pairs=2)))
    (batch,) = eval_batches(index, image_size=16, tokenizer=TOKENIZER, batch_size=4)
    expected = evaluation_pixels(sample(1)[1]["png"], 16)
    assert np.array_equal(batch.images[1].permute(1, 2, 0).numpy(), expected)
    assert batch.images.dtype == torch.uint8


def test_damage_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [sample(number) for number in range(5)]
    rows[2][1]["png"] = b"broken"
    index = index_shards(str(write_tar(tmp_path / "a.tar", rows)))
    batches = list(eval_batches(index, image_size=16, tokenizer=TOKENIZER, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 1, 1]
    assert "left out 1 sample(s): {'broken image': 1}" in caplog.text


def test_images_without_captions(tmp_path: Path) -> None:
    rows = [(key, {"png": members["png"]}) for key, members in map(sample, range(3))]
    index = index_shards(str(write_tar(tmp_path / "a.tar", rows)), needs=())
    (batch,) = eval_batches(
        index, image_size=16, tokenizer=TOKENIZER, batch_size=8, caption_key=None
    )
    assert batch.captions == ("", "", "")
