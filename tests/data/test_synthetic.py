"""Random shards are shards, the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastclip.data import synthetic
from fastclip.data.eval_loader import eval_batches
from fastclip.data.index import index_shards
from fastclip.data.reader import Members
from fastclip.data.shard_writer import sha256
from fastclip.data.synthetic import build_synthetic


def test_shards_are_readable_and_repeatable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "PAIRS_PER_SHARD", 4)
    build_synthetic(tmp_path / "a", 10, image_size=32, seed=1)
    build_synthetic(tmp_path / "b", 10, image_size=32, seed=1)
    build_synthetic(tmp_path / "c", 10, image_size=32, seed=2)
    names = ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    sums = {d: [sha256(tmp_path / d / name) for name in names] for d in "abc"}
    assert sums["a"] == sums["b"]
    assert sums["a"] != sums["c"]
    index = index_shards(str(tmp_path / "a"), needs=("txt", "json"))
    assert (len(index), index.problems) == (10, [])
    batches = list(eval_batches(index, image_size=32, batch_size=10))
    assert len({Members(index[number]).captions("txt")[0] for number in range(10)}) == 10
    assert batches[0].images.float().std() > 20


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pairs=0"):
        build_synthetic(tmp_path, 0)
