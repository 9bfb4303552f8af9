"""The stream of training batches: exact, whatever the ranks, threads and damaged samples."""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastclip.data.batch import Batch
from fastclip.data.config import DataConfig
from fastclip.data.loader import TrainLoader
from fastclip.data.reader import caption_id
from fastclip.tokenizer import Tokenizer
from shards import loader_threads, sample, write_shards, write_tar

TOKENIZER = Tokenizer(context_length=32)


def _loader(
    train: Path | str,
    *,
    batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    micro_batches: int = 1,
    **options: Any,
) -> TrainLoader:
    return TrainLoader(
        DataConfig(train=str(train), **options),
        image_size=24,
        tokenizer=TOKENIZER,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        micro_batches=micro_batches,
    )


def _take(loader: TrainLoader, batches: int) -> list[Batch]:
    return [next(loader) for _ in range(batches)]


def _in_order(ranks: list[TrainLoader], steps: int) -> list[str]:
    """Keys of all ranks' batches as the stream has them."""
    streams = [_take(loader, steps) for loader in ranks]
    return [key for step in range(steps) for stream in streams for key in stream[step].keys]


def _same(a: Batch, b: Batch) -> bool:
    return a.keys == b.keys and torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), pairs=21, per_shard=8)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_each_epoch_without_overlap_or_loss(shards: Path, world_size: int) -> None:
    loaders = [_loader(shards, rank=r, world_size=world_size) for r in range(world_size)]
    steps = 3 * 21 // (4 * world_size) + 1
    streams = [_take(loader, steps) for loader in loaders]
    keys = [key for step in range(steps) for stream in streams for key in stream[step].keys]
    for epoch in range(len(keys) // 21):
        assert len(set(keys[21 * epoch : 21 * (epoch + 1)])) == 21
    assert loaders[0].epoch == pytest.approx(steps * 4 * world_size / 21)
    for loader in loaders:
        loader.close()


def test_threads_and_prefetching_change_nothing(shards: Path) -> None:
    with (
        _loader(shards, workers=1, prefetch_batches=1, crop_scale=(0.5, 1.0)) as one,
        _loader(shards, workers=3, prefetch_batches=5, crop_scale=(0.5, 1.0)) as many,
    ):
        assert all(_same(a, b) for a, b in zip(_take(one, 12), _take(many, 12), strict=True))


def test_threads_are_the_machines_shared_among_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(train="shards")
    for cores, ranks, threads in ((8, 1, 7), (8, 3, 1), (1, 1, 1), (2, 4, 1), (64, 2, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert config.threads(ranks) == threads
    assert DataConfig(train="shards", workers=5).threads(4) == 5
    with pytest.raises(ValueError, match=r"data\.workers is a number or auto"):
        DataConfig(train="shards", workers="all")  # pyright: ignore[reportArgumentType]


def test_another_number_of_ranks_goes_on_with_the_same_samples(shards: Path) -> None:
    with _loader(shards, batch_size=12) as whole:
        expected = [key for batch in _take(whole, 4) for key in batch.keys]
    pair = [_loader(shards, batch_size=6, rank=r, world_size=2) for r in range(2)]
    keys = _in_order(pair, 2)
    state = pair[0].state_dict()
    assert state == pair[1].state_dict()
    three = [_loader(shards, batch_size=4, rank=r, world_size=3) for r in range(3)]
    for loader in three:
        loader.load_state_dict(state)
    keys += _in_order(three, 2)
    assert keys == expected
    for loader in (*pair, *three):
        loader.close()


def test_states_of_other_runs_are_refused(shards: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path, pairs=20)
    with _loader(shards) as loader, _loader(shards, seed=4) as seed, _loader(other) as data:
        with pytest.raises(ValueError, match=r"set run\.seed=4"):
            loader.load_state_dict(seed.state_dict())
        with pytest.raises(ValueError, match="not those of the checkpoint"):
            loader.load_state_dict(data.state_dict())


def test_what_a_batch_holds(shards: Path) -> None:
    with _loader(shards, positives="label", text="trimmed") as loader:
        batch = next(loader)
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 24, 24)
    assert batch.tokens.dtype == batch.lengths.dtype == torch.int32
    assert batch.tokens.shape == (4, 8)  # trimmed to the longest text, in steps of 8
    assert batch.packed is None
    assert batch.computed_lengths() == [8]
    assert batch.ids is not None
    for key, caption, about, label in zip(
        batch.keys, batch.captions, batch.metadata, batch.ids.tolist(), strict=True
    ):
        _, members = sample(int(key))
        assert caption.encode() == members["txt"]
        assert about == json.loads(members["json"])
        assert about["label_id"] == label
    tokens, lengths = TOKENIZER.encode_batch(batch.captions)
    assert torch.equal(batch.tokens, tokens[:, :8])
    assert torch.equal(batch.lengths, lengths)


def test_packed_texts_come_in_micro_batches(shards: Path) -> None:
    with _loader(shards, micro_batches=2) as loader:
        batch = next(loader)
    assert batch.packed is not None
    assert [len(part) for part in batch.packed] == [2, 2]
    assert sorted(batch.computed_lengths()) == sorted(batch.lengths.tolist())
    for part, rows in zip(batch.packed, batch.tokens.split(2), strict=True):
        starts = part.segments.starts.tolist()
        for row, place in zip(rows, part.places.tolist(), strict=True):
            ids = part.ids[starts[place] : starts[place + 1]]
            assert torch.equal(ids, row[: len(ids)])
            assert not row[len(ids) :].any()
    with pytest.raises(ValueError, match="batch_size=4 in 3 parts"):
        _loader(shards, micro_batches=3)


def test_untrimmed_text_and_plain_positives(shards: Path) -> None:
    with _loader(shards, text="padded") as loader:
        batch = next(loader)
    assert batch.tokens.shape == (4, 32)
    assert batch.ids is None


def _captioned(folder: Path, about: dict[str, Any]) -> Path:
    rows = []
    for number in range(4):
        key, members = sample(number)
        members["json"] = json.dumps(about).encode()
        rows.append((key, members))
    return write_tar(folder / "a.tar", rows)


def test_captions_in_json_and_their_sampling(tmp_path: Path) -> None:
    path = _captioned(tmp_path, {"texts": ["One. Two!", "three"]})
    with _loader(path, caption_key="json:texts") as loader:
        assert {c for b in _take(loader, 5) for c in b.captions} == {"One. Two!"}
    with _loader(path, caption_key="json:texts", sample_caption=True) as loader:
        assert {c for b in _take(loader, 9) for c in b.captions} == {"One. Two!", "three"}
    with _loader(path, caption_key="json:texts", sample_sentence=True) as loader:
        assert {c for b in _take(loader, 9) for c in b.captions} == {"One.", "Two!"}
    with (
        _loader(path, caption_key="json:nothing") as loader,
        pytest.raises(ValueError, match=r"cannot be used .*missing caption"),
    ):
        next(loader)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """60 pairs in three shards: 3 images broken, 1 caption missing, the last shard cut."""
    for shard in range(3):
        rows = []
        for number in range(20 * shard, 20 * shard + 20):
            key, members = sample(number)
            if number in (3, 17, 33):
                members["png"] = members["png"][:60]
            if number == 21:
                del members["txt"]
            rows.append((key, members))
        write_tar(tmp_path / f"{shard}.tar", rows)
    last = tmp_path / "2.tar"
    content = last.read_bytes()
    last.write_bytes(content[: content.index(b"000055.txt") + 600])
    return tmp_path


def test_damage_is_counted_named_once_and_replaced(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="fastclip")
    with _loader(damaged, positives="label") as loader:
        assert loader.samples_per_epoch == 60 - 1 - 5  # the caption; 000055 to 000059
        batches = _take(loader, 30)
        again = loader.report()
    assert again == {"truncated shard": 1, "missing caption": 1, "broken image": 3}
    keys = Counter(key for batch in batches for key in batch.keys)
    assert not {"000003", "000017", "000033", "000021", "000055"} & set(keys)
    assert sum(keys.values()) == 120
    named = [record.message for record in caplog.records if "000017" in record.message]
    assert len(named) == 1
    assert named[0].startswith("left out 0.tar: 000017: broken image")
    with _loader(damaged, positives="label", workers=3) as other:
        assert all(_same(a, b) for a, b in zip(batches, _take(other, 30), strict=True))


def test_too_much_damage_stops_the_run(tmp_path: Path) -> None:
    rows = []
    for number in range(300):
        key, members = sample(number)
        if number % 4 == 0:
            members["png"] = b"no image"
        rows.append((key, members))
    write_tar(tmp_path / "a.tar", rows)
    with (
        _loader(tmp_path, batch_size=50, max_bad_fraction=0.1) as loader,
        pytest.raises(ValueError, match=r"more than data\.max_bad_fraction=0\.1"),
    ):
        _take(loader, 10)
    assert loader_threads() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "at least 1"),
        ({"crop_scale": (0.0, 1.0)}, r"data\.crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, r"data\.crop_scale"),
        ({"caption_key": "json:"}, "lacks the field's name"),
        ({"caption_key": "cap"}, "is txt or json:field"),
        ({"max_bad_fraction": 2.0}, r"data\.max_bad_fraction"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(train="x", **options)


@pytest.mark.parametrize("workers", [1, 3])
def test_each_sample_exactly_once_in_each_of_three_epochs(shards: Path, workers: int) -> None:
    with _loader(shards, batch_size=7, workers=workers) as loader:
        keys = Counter(key for batch in _take(loader, 9) for key in batch.keys)
        assert loader.epoch == 3.0
    assert keys == {sample(number)[0]: 3 for number in range(21)}


@pytest.mark.parametrize("step", [0, 1, 5, 6])
def test_resuming_is_exact_at_any_step(shards: Path, step: int) -> None:
    options: dict[str, Any] = {"crop_scale": (0.3, 1.0), "positives": "caption", "seed": 5}
    with _loader(shards, workers=1, **options) as whole:
        expected = _take(whole, step + 4)
        with _loader(shards, workers=1, **options) as first:
            _take(first, step)
            state = json.loads(json.dumps(first.state_dict()))
    with _loader(shards, workers=3, prefetch_batches=2, **options) as second:
        next(second)  # batches under way are thrown away
        second.load_state_dict(state)
        for ours, theirs in zip(_take(second, 4), expected[step:], strict=True):
            assert _same(ours, theirs)
            assert ours.ids is not None
            assert theirs.ids is not None
            assert torch.equal(ours.ids, theirs.ids)
            assert ours.captions == theirs.captions
        assert second.state_dict()["position"] == 4 * (step + 4)


def test_epochs_cut_the_same_image_differently(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [sample(0)])
    with _loader(path, batch_size=1, crop_scale=(0.3, 0.9)) as loader:
        images = [batch.images.numpy().tobytes() for batch in _take(loader, 4)]
    assert len(set(images)) == 4


def test_settings_for_images_reach_the_decoder(tmp_path: Path) -> None:
    rows = [sample(number) for number in range(2)]
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    out = io.BytesIO()
    Image.linear_gradient("L").save(out, "PNG", exif=exif)  # black above, white below
    rows[0][1]["png"] = out.getvalue()
    path = write_tar(tmp_path / "a.tar", rows)
    tops = []
    for turned in (False, True):
        with _loader(path, batch_size=2, apply_orientation=turned) as loader:
            batch = next(loader)
        tops.append(int(batch.images[batch.keys.index("000000"), 0, 0].max()))
    assert tops[0] < 10
    assert tops[1] > 245
    with _loader(path, batch_size=2, max_pixels=72 * 72, max_bad_fraction=1.0) as loader:
        assert next(loader).keys == ("000001", "000001")
        assert loader.report() == {"oversized image": 1}


def test_equal_captions_share_an_id(shards: Path) -> None:
    with _loader(shards, batch_size=21, positives="caption") as loader:
        batch = next(loader)
    assert batch.ids is not None
    assert batch.ids.dtype == torch.int64
    assert batch.ids.tolist() == [caption_id(caption) for caption in batch.captions]
    assert batch.metadata == ({},) * 21  # the json is not even read


@pytest.mark.parametrize("label", [True, "3", 1.5, None, 2**63])
def test_labels_that_are_no_ids_are_named(tmp_path: Path, label: object) -> None:
    path = _captioned(tmp_path, {"label_id": label})
    with (
        _loader(path, positives="label") as loader,
        pytest.raises(ValueError, match=r"sample 00000\d has no whole number of 64 bits"),
    ):
        next(loader)


@pytest.mark.parametrize(("about", "kind"), [(None, "missing metadata"), (b"{", "broken metadata")])
def test_labels_without_usable_json(tmp_path: Path, about: bytes | None, kind: str) -> None:
    rows = [sample(number) for number in range(6)]
    if about is None:
        del rows[2][1]["json"]
    else:
        rows[2][1]["json"] = about
    path = write_tar(tmp_path / "a.tar", rows)
    with _loader(path, positives="label") as loader:
        keys = {key for batch in _take(loader, 6) for key in batch.keys}
        assert loader.report() == {kind: 1}
    assert keys == {sample(number)[0] for number in (0, 1, 3, 4, 5)}
    with _loader(path) as loader:  # it costs only those who need it
        assert {key for batch in _take(loader, 6) for key in batch.keys} == keys | {"000002"}


def test_less_data_than_one_global_batch_is_an_error(shards: Path) -> None:
    _loader(shards, batch_size=21).close()
    _loader(shards, batch_size=7, rank=2, world_size=3).close()
    for batch_size, world_size in [(22, 1), (8, 3)]:
        with pytest.raises(ValueError, match=r"a global batch of 2\d pairs is more than the 21"):
            _loader(shards, batch_size=batch_size, world_size=world_size)


def test_a_small_damaged_corpus_stops_the_run_as_well(tmp_path: Path) -> None:
    rows = [sample(number) for number in range(30)]
    for _, members in rows[::3]:
        members["png"] = b"no image"
    path = write_tar(tmp_path / "a.tar", rows)
    with (
        _loader(path, batch_size=30, max_bad_fraction=0.1) as loader,
        pytest.raises(ValueError, match=r"samples drawn cannot be used \(.*'broken image': 10"),
    ):
        _take(loader, 30)
    with _loader(path, batch_size=30, max_bad_fraction=0.5) as loader:
        _take(loader, 30)
        assert loader.report() == {"broken image": 10}
