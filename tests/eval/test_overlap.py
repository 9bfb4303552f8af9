"""Planted copies are found and nothing else; a killed search goes on; the analysis by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastclip.data.hash_cache import HashCache
from fastclip.data.index import ShardIndex, index_shards
from fastclip.data.pixels import PixelReader
from fastclip.eval.correlation import aligned_correlation
from fastclip.eval.overlap import (
    Duplicates,
    DuplicateSearch,
    analyse_overlap,
    find_duplicates,
    significance_level,
)
from pictures import COPIES, encoded, mirrored, scene
from shards import write_tar

TRAIN = 45
MIRRORED, OTHERS = 5, 20


def _colours(images: Tensor) -> Tensor:
    """Features of a plain kind: colours of 4 × 4 fields."""
    return F.normalize(F.avg_pool2d(images.float(), images.shape[-1] // 4).flatten(1), dim=1)


@pytest.fixture
def train(tmp_path: Path) -> ShardIndex:
    (tmp_path / "train").mkdir()
    for shard in range(3):
        numbers = range(shard * 15, shard * 15 + 15)
        rows = [(f"train-{n}", {"jpg": encoded(scene(n), quality=92)}) for n in numbers]
        write_tar(tmp_path / "train" / f"{shard}.tar", rows)
    return index_shards(str(tmp_path / "train"), needs=())


@pytest.fixture
def test(tmp_path: Path) -> ShardIndex:
    rows = []
    for number in range(TRAIN):
        change = list(COPIES)[number % len(COPIES)]
        file = COPIES[change](scene(number))
        rows.append((f"copy-{number}", {"png" if change == "png" else "jpg": file}))
    rows += [(f"mirrored-{n}", {"jpg": mirrored(scene(n))}) for n in range(MIRRORED)]
    rows += [(f"other-{n}", {"jpg": encoded(scene(1000 + n))}) for n in range(OTHERS)]
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test" / "0.tar", rows)
    return index_shards(str(tmp_path / "test"), needs=())


@pytest.fixture
def reader() -> Iterator[PixelReader]:
    with PixelReader(workers=2) as opened:
        yield opened


def _find(
    train: ShardIndex,
    test: ShardIndex,
    reader: PixelReader,
    folder: Path,
    search: DuplicateSearch | None = None,
) -> tuple[Duplicates, list[str]]:
    lines: list[str] = []
    found = find_duplicates(
        train,
        test,
        _colours,
        search=search or DuplicateSearch(),
        reader=reader,
        cache=HashCache(folder, reader, lines.append),
        image_size=32,
    )
    return found, lines


def test_copies_are_found_and_nothing_else(
    train: ShardIndex, test: ShardIndex, reader: PixelReader, tmp_path: Path
) -> None:
    found, _ = _find(train, test, reader, tmp_path / "hashes")
    assert (found.train_images, found.test_images) == (TRAIN, TRAIN + MIRRORED + OTHERS)
    duplicates = [pair for pair in found.pairs if pair.duplicate]
    assert all(train[p.train].key == f"train-{test[p.test].key[5:]}" for p in duplicates)
    assert len(duplicates) >= 0.9 * TRAIN
    assert all(p.hamming <= 20 and p.correlation >= 0.97 and p.cosine > 0.9 for p in duplicates)


def test_thresholds_decide(
    train: ShardIndex, test: ShardIndex, reader: PixelReader, tmp_path: Path
) -> None:
    found, _ = _find(train, test, reader, tmp_path, DuplicateSearch(radius=0))
    assert 0 < len(found.pairs) < 0.5 * TRAIN
    found, _ = _find(train, test, reader, tmp_path, DuplicateSearch(cosine=1.0, correlation=0.0))
    assert len(found.pairs) >= 0.9 * TRAIN  # all are reported
    assert sum(pair.duplicate for pair in found.pairs) < 0.5 * TRAIN
    with pytest.raises(ValueError, match="cosine is from -1 to 1, not 2"):
        DuplicateSearch(cosine=2)


def test_a_set_is_its_own_copy(train: ShardIndex, reader: PixelReader, tmp_path: Path) -> None:
    found, lines = _find(train, train, reader, tmp_path)
    assert [(pair.test, pair.train, pair.hamming) for pair in found.pairs] == [
        (number, number, 0) for number in range(TRAIN)
    ]
    assert len(lines) == 3  # hashed once for both sides


def test_candidates_are_the_nearest(reader: PixelReader, tmp_path: Path) -> None:
    image = scene(1)
    rows = [(f"{q:02d}", {"jpg": encoded(image, quality=q)}) for q in (5, 10, 30, 70, 95)]
    write_tar(tmp_path / "0.tar", [("same", {"png": encoded(image, "PNG")}), *rows])
    write_tar(tmp_path / "test.tar", [("same", {"png": encoded(image, "PNG")})])
    found, _ = _find(
        index_shards(str(tmp_path / "0.tar"), needs=()),
        index_shards(str(tmp_path / "test.tar"), needs=()),
        reader,
        tmp_path / "hashes",
        DuplicateSearch(candidates=2),
    )
    assert [(pair.train, pair.hamming, pair.correlation) for pair in found.pairs] == [(0, 0, 1.0)]
    assert found.beyond == 4


def test_a_killed_search_goes_on(
    train: ShardIndex, test: ShardIndex, reader: PixelReader, tmp_path: Path
) -> None:
    expected, lines = _find(train, test, reader, tmp_path / "whole")
    assert len(lines) == 4
    told: list[str] = []

    def kill(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(HashCache(tmp_path / "killed", reader, kill).blocks(train))
    (tmp_path / "killed" / "x.safetensors.partial").write_bytes(b"half")  # of a kill while writing
    found, lines = _find(train, test, reader, tmp_path / "killed")
    assert found == expected
    assert len(lines) == 2  # the test's and the last shard
    write_tar(Path(train.shards[1]), [("new", {"jpg": encoded(scene(77))})])  # pyright: ignore
    changed = index_shards(str(Path(train.shards[1]).parent), needs=())  # pyright: ignore
    found, lines = _find(changed, test, reader, tmp_path / "killed")
    assert found.train_images == 31
    assert len(lines) == 1


def test_a_damaged_cache_names_its_file(
    train: ShardIndex, reader: PixelReader, tmp_path: Path
) -> None:
    cache = HashCache(tmp_path / "hashes", reader, lambda line: None)
    cache.all(train)
    damaged = next(iter((tmp_path / "hashes").iterdir()))
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{damaged.name} cannot be read .*delete it"):
        cache.all(train)


def test_correlation_follows_a_cut_and_not_a_colour() -> None:
    def small(image: Image.Image) -> Tensor:
        pixels = np.array(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    image = scene(5)
    cut = image.crop((10, 0, 200, 152))  # 5 % of one corner
    red, green, blue = image.split()
    recoloured = Image.merge("RGB", (blue, red, green))
    pale = Image.blend(Image.new("RGB", image.size, "white"), image, 0.5)
    plain = Image.new("RGB", (64, 64), "grey")
    second = torch.stack([small(i) for i in (image, cut, recoloured, scene(6), plain, pale)])
    first = torch.stack([small(image), small(plain)])
    pairs = torch.tensor([[0, 0, 0, 0, 0, 1, 0], [0, 1, 2, 3, 4, 4, 5]])
    same, part, other_colour, other, nothing, both_plain, paler = aligned_correlation(
        first, second, pairs
    ).tolist()
    assert same == both_plain == 1
    assert part > 0.97
    assert max(other_colour, other) < 0.8
    assert abs(nothing) < 0.01
    assert paler < 0.5  # half of the contrast is too little


def test_analysis_by_hand() -> None:
    overlaps = np.arange(100) < 10
    correct = np.zeros(100, bool)
    correct[:9] = correct[10:55] = True
    analysis = analyse_overlap("t", correct, overlaps)
    assert (analysis.images, analysis.overlapping, analysis.overlap) == (100, 10, 0.1)
    assert analysis.accuracy_all == 0.54
    assert analysis.accuracy_clean == 0.5
    assert analysis.accuracy_overlap == 0.9
    assert analysis.all_minus_clean == pytest.approx(0.04)
    assert analysis.p_value == pytest.approx(11 / 1024)  # 9 or 10 of 10 coins
    assert analysis.interval is not None
    assert analysis.difference is not None
    assert analysis.difference[0] == pytest.approx(0.4)
    assert analysis.difference[1] == pytest.approx(analysis.interval[0] - 0.5)
    assert analysis.interval[0] < 0.5 < 0.9 < analysis.interval[1]


def test_analysis_where_a_side_is_empty() -> None:
    correct = np.array([True, False])
    none = analyse_overlap("none", correct, np.array([False, False]))
    assert (none.accuracy_clean, none.accuracy_overlap, none.p_value) == (0.5, None, None)
    assert none.all_minus_clean == 0
    assert none.difference is None
    every = analyse_overlap("every", correct, np.array([True, True]))
    assert (every.accuracy_clean, every.accuracy_overlap, every.p_value) == (None, 0.5, None)
    assert every.all_minus_clean is None
    some = analyse_overlap("some", correct, np.array([True, False]))
    assert significance_level([none, every, some, some]) == 0.025
    with pytest.raises(ValueError, match="task t: 0 results"):
        analyse_overlap("t", np.zeros(0, bool), np.zeros(0, bool))
