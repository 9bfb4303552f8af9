"""The loader's sources and decoders: mixtures, DALI beside the CPU, quarantine and balance."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFilter

from fastclip.data.batch import Batch
from fastclip.data.config import DataConfig
from fastclip.data.indexing import build_index
from fastclip.data.loader import TrainLoader
from fastclip.tokenizer import Tokenizer
from shards import sample, write_shards, write_tar

TOKENIZER = Tokenizer(context_length=32)


def _loader(train: str, batch_size: int = 4, rank: int = 0, world: int = 1, **options: Any):
    quarantine = options.pop("quarantine", None)
    return TrainLoader(
        DataConfig(train=train, **options),
        image_size=24,
        tokenizer=TOKENIZER,
        batch_size=batch_size,
        rank=rank,
        world_size=world,
        seed=0,
        quarantine=quarantine,
    )


def _stream(loaders: list[TrainLoader], steps: int) -> list[tuple[str, bytes]]:
    """Key and pixels of each place in the stream."""
    batches = [[next(loader) for _ in range(steps)] for loader in loaders]
    found: list[tuple[str, bytes]] = []
    for step in range(steps):
        for own in batches:
            batch: Batch = own[step]
            images = batch.images.contiguous()
            found += [(k, images[n].numpy().tobytes()) for n, k in enumerate(batch.keys)]
    return found


@pytest.mark.parametrize("weights", [(), (3, 1)])
def test_every_step_is_the_same_at_any_world_size(tmp_path: Path, weights: tuple[int, ...]) -> None:
    """Ordered ids and pixels of the global stream, resumed at 1, 2 and 3 ranks, over 3 epochs."""
    for name, count in (("a", 26), ("b", 10)):
        (tmp_path / name).mkdir()
        rows = [(f"{name}{n:03d}", sample(n)[1]) for n in range(count)]
        write_tar(tmp_path / name / "0.tar", rows[: count // 2])
        write_tar(tmp_path / name / "1.tar", rows[count // 2 :])
    train = f"{tmp_path}/a::{tmp_path}/b"
    options = {"weights": weights, "crop_scale": (0.5, 1.0)}
    with _loader(train, 12, **options) as whole:
        expected = _stream([whole], 9)  # 3 epochs of 36
    assert len(set(expected)) > 90  # crops differ from epoch to epoch
    state: dict[str, Any] = {}
    found: list[tuple[str, bytes]] = []
    for world, steps in ((1, 2), (2, 3), (3, 1), (1, 3)):
        loaders = [_loader(train, 12 // world, rank, world, **options) for rank in range(world)]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        found += _stream(loaders, steps)
        states = [loader.state_dict() for loader in loaders]
        assert all(one == states[0] for one in states)
        state = states[0]
        assert len(json.dumps(state)) <= 256
        for loader in loaders:
            loader.close()
    assert found == expected
    keys = Counter(key for key, _ in expected)
    if weights:
        assert sum(n for key, n in keys.items() if key[0] == "b") == 27
        assert {n for key, n in keys.items() if key[0] == "b"} <= {2, 3}  # 27 of 10
        assert {n for key, n in keys.items() if key[0] == "a"} == {3, 4}  # 81 of 26
    else:
        assert set(keys.values()) == {3}


def test_weights_are_part_of_where_a_run_stands(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 20, 10)
    train = f"{shards}/00000.tar::{shards}/00001.tar"
    with _loader(train, weights=(1, 1)) as loader:
        state = loader.state_dict()
    for other in ((), (2, 1)):
        with (
            _loader(train, weights=other) as loader,
            pytest.raises(ValueError, match=r"data\.weights"),
        ):
            loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1,)}, r"each of the 2 source\(s\)"),
        ({"weights": (1, 0)}, "a whole number from 1 on"),
        ({"decoder": "opencv"}, "data.decoder is auto, native, pillow, dali, not 'opencv'"),
        ({"decoder": "pillow", "reduce_jpeg": True}, "is for data.decoder=native, not pillow"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(train="a::b", **options)


def test_a_source_without_samples_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 20, 10)
    write_tar(tmp_path / "empty.tar", [("a", {"txt": b"x"})])
    with pytest.raises(ValueError, match=r"empty\.tar: 1 shard\(s\), and no usable sample"):
        _loader(f"{shards}::{tmp_path}/empty.tar", weights=(1, 1))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    rows = []
    for number in range(30):
        key, members = sample(number)
        if number in (3, 17):
            members["png"] = members["png"][: len(members["png"]) // 2]
        rows.append((key, members))
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "0.tar", rows)
    return tmp_path / "data"


def test_the_quarantine_and_the_balance_of_each_epoch(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fastclip")
    path = damaged.parent / "quarantine.jsonl"
    with _loader(str(damaged), 5, quarantine=path) as loader:
        for _ in range(12):
            next(loader)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(entry["key"] for entry in entries) == ["000003", "000017"]
    for entry in entries:
        content = (damaged / "0.tar").read_bytes()
        assert content[entry["offset"] :].startswith(b"\x89PNG")
        assert entry["kind"] == "broken image"
    lines = [r.message for r in caplog.records if "planned" in r.message]
    assert lines == [
        f"epoch {n}: 30 samples planned for this rank = 28 delivered + 2 replaced" for n in (0, 1)
    ]


def test_an_index_beside_the_shards_changes_no_batch(damaged: Path) -> None:
    with _loader(str(damaged)) as loader:
        state, expected = loader.state_dict(), _stream([loader], 15)
    build_index(str(damaged), workers=0)
    with _loader(str(damaged)) as loader:
        loader.load_state_dict(state)
        assert _stream([loader], 15) == expected


def test_native_and_pillow_give_the_same_stream(photographs: Path) -> None:
    streams = []
    for decoder in ("native", "pillow"):
        with _loader(str(photographs), decoder=decoder, crop_scale=(0.3, 1.0)) as loader:
            streams.append(_stream([loader], 6))
    assert streams[0] == streams[1]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Soft pictures in several formats; one JPEG is damaged inside, one has transparency."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(24):
        noise = torch.randint(0, 256, (50 + number, 70, 3), dtype=torch.uint8, generator=generator)
        image = Image.fromarray(noise.numpy()).filter(ImageFilter.GaussianBlur(2))
        kind = ("JPEG", "PNG", "WEBP")[number % 3]
        if number == 4:
            image.putalpha(128)
        out = io.BytesIO()
        image.save(out, kind)
        content = bytearray(out.getvalue())
        if number == 6:
            content[len(content) // 2 : -2] = b""
        rows.append((f"{number:03d}", {kind.lower(): bytes(content), "txt": b"noise"}))
    (tmp_path / "photographs").mkdir()
    write_tar(tmp_path / "photographs" / "0.tar", rows)
    return tmp_path / "photographs"


def test_dali_gives_the_stream_that_the_cpu_gives(
    photographs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    batches: dict[str, list[Batch]] = {}
    for decoder in ("native", "dali"):
        with _loader(str(photographs), 6, decoder=decoder, max_bad_fraction=1.0) as loader:
            batches[decoder] = [next(loader) for _ in range(8)]
    assert "data.decoder=dali on a CPU is slower" in caplog.text
    worst = 0.0
    for ours, theirs in zip(*batches.values(), strict=True):
        assert ours.keys == theirs.keys
        assert ours.captions == theirs.captions
        assert theirs.images.shape == (6, 3, 24, 24)
        difference = (ours.images.float() - theirs.images.float()).abs()
        assert difference.mean() <= 0.2
        worst = max(worst, float(difference.max()))
    assert 0 < worst <= 12  # it did run


def test_one_broken_image_costs_dali_no_batch(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the check of the headers sees nothing wrong."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    with _loader(str(photographs), 6, decoder="dali", max_bad_fraction=1.0) as loader:
        assert loader._dali is not None
        monkeypatch.setattr(loader._dali, "takes", lambda image: True)
        keys = [key for _ in range(4) for key in next(loader).keys]
        kinds = loader.report()
        for built in loader._queue:
            built.result()
        # Each place once, whichever decoder found the damage.
        assert loader._quarantine.seen - loader._quarantine.failed == loader._scheduled
    with _loader(str(photographs), 6, decoder="native", max_bad_fraction=1.0) as loader:
        assert keys == [key for _ in range(4) for key in next(loader).keys]
        assert loader.report() == kinds
