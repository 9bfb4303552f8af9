"""Embedding: killed, gone on with, added to, and what cannot be used."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastclip.data import remote
from fastclip.search import embed as module
from fastclip.search.embed import EmbedSettings, embed
from fastclip.search.index import SearchIndex
from fastclip.search.info import load_description
from indexed import SETTINGS, write_index, write_model
from remote_shards import Server
from shards import sample, write_tar


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a model, and their index made without a break."""
    folder = tmp_path_factory.mktemp("whole")
    write_index(folder)
    return folder


def _again(whole: Path, out: Path, shards: str = "shards", **changes: Any) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)
    embed(str(whole / shards), whole / "model", out, settings)


def _contents(index: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in index.iterdir() if path.name != "lock"}


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("write_part", 1),
        ("write_part", 3),
        ("save_description", 2),
        ("save_description", 4),  # the finished one
        ("build_vectors", 1),
        ("_tidy", 1),
    ],
)
def test_what_a_break_leaves_becomes_the_same_index(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    function: str, call: int, after: bool,
) -> None:  # fmt: skip
    original: Callable[..., Any] = getattr(module, function)
    calls = 0

    def breaking(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise _Killed
        result = original(*arguments)
        if calls == call:
            raise _Killed
        return result

    monkeypatch.setattr(module, function, breaking)
    with pytest.raises(_Killed):
        _again(whole, tmp_path)
    monkeypatch.undo()
    _again(whole, tmp_path)
    assert _contents(tmp_path) == _contents(whole / "index")


def _killed_process(whole: Path, out: Path) -> None:
    original = module.save_description

    def kill(path: Path, description: Any) -> None:
        original(path, description)
        if len(description.parts) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    module.save_description = kill
    _again(whole, out)


def test_kill_9(whole: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_process, args=(whole, tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(load_description(tmp_path / "unfinished.json").parts) == 2
    with pytest.raises(FileNotFoundError, match="not finished"):
        SearchIndex.open(tmp_path)
    _again(whole, tmp_path)
    assert _contents(tmp_path) == _contents(whole / "index")


def test_parts_of_a_shard(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_SAMPLES", 7)
    _again(whole, tmp_path / "index")
    index, expected = SearchIndex.open(tmp_path / "index"), SearchIndex.open(whole / "index")
    assert [part.samples for part in index.description.parts] == [7, 7, 2] * 3
    assert [index.record(n) for n in range(48)] == [expected.record(n) for n in range(48)]


def test_shards_that_come_later_are_added(whole: Path, tmp_path: Path) -> None:
    _again(whole, tmp_path, shards="shards/00000.tar")
    assert SearchIndex.open(tmp_path).info.count == 16
    _again(whole, tmp_path)
    ours, at_once = _contents(tmp_path), _contents(whole / "index")
    del ours["index.json"], at_once["index.json"]  # the patterns differ
    assert ours == at_once
    index = SearchIndex.open(tmp_path)
    assert (index.info.count, index.info.shards) == (48, 3)
    before = _contents(tmp_path)
    _again(whole, tmp_path)  # nothing is left to do
    assert _contents(tmp_path) == before


def test_an_index_serves_while_it_is_added_to(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _again(whole, tmp_path, shards="shards/00000.tar")
    opened = SearchIndex.open(tmp_path)

    def kill(*arguments: Any) -> Any:
        raise _Killed

    monkeypatch.setattr(module, "build_vectors", kill)
    with pytest.raises(_Killed):
        _again(whole, tmp_path)
    monkeypatch.undo()
    assert SearchIndex.open(tmp_path).info == opened.info
    with pytest.raises(ValueError, match=r"0000\d.tar"):
        _unfinished_without_its_shards(whole, tmp_path)


def _unfinished_without_its_shards(whole: Path, out: Path) -> None:
    description = load_description(out / "unfinished.json")
    module.save_description(
        out / "unfinished.json", dataclasses.replace(description, parts=description.parts[:2])
    )
    _again(whole, out, shards="shards/00000.tar")


def test_other_models_and_settings_are_refused(whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole / "index", tmp_path / "index"))
    other = write_model(tmp_path / "other", seed=9)
    with pytest.raises(ValueError, match=r"was made with the model .* name another folder"):
        embed(str(whole / "shards"), other, out, SETTINGS)
    with pytest.raises(ValueError, match="was made with dtype float16, not float32"):
        _again(whole, out, dtype="float32")
    with pytest.raises(ValueError, match="was made with fields"):
        _again(whole, out, fields=("label", "style"))
    assert _contents(out) == _contents(whole / "index")


def test_a_changed_shard_is_refused(tmp_path: Path) -> None:
    out = write_index(tmp_path, pairs=20)
    write_tar(tmp_path / "shards" / "00001.tar", [sample(n) for n in (40, 41)])
    with pytest.raises(ValueError, match=r"00001.tar is not what it was when it was embedded"):
        _again(tmp_path, out)


def test_one_process_at_a_time(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = pytest.raises(ValueError, match="another process is embedding into")
    with module.alone(tmp_path, tmp_path, "embedding"), busy:
        _again(whole, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without a launcher"):
        _again(whole, tmp_path)


def test_what_cannot_be_decoded_is_listed_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [sample(number) for number in range(12)]
    rows[2][1]["png"] = rows[2][1]["png"][:100]
    rows[5][1]["png"] = b"no image"
    rows[7][1]["txt"] = b"\xff\xfe"
    rows[8][1].pop("txt")
    rows[9][1].pop("json")
    rows[10][1]["json"] = b"{"
    rows[11][1]["json"] = b"[]"
    (tmp_path / "shards").mkdir()
    shard = write_tar(tmp_path / "shards" / "00000.tar", rows)
    write_model(tmp_path / "model")
    with caplog.at_level("INFO", "fastclip"):
        _again(tmp_path, tmp_path / "index")
    index = SearchIndex.open(tmp_path / "index")
    assert (index.info.count, index.info.quarantined) == (10, 2)
    lines = (tmp_path / "index" / "quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(e["key"], e["kind"]) for e in entries] == [
        ("000002", "broken image"), ("000005", "broken image"),
    ]  # fmt: skip
    assert {entry["shard"] for entry in entries} == {str(shard)}
    records = {record.key: record for record in map(index.record, range(10))}
    assert records["000007"].caption == ""
    assert records["000007"].fields == {"label": json.loads(rows[7][1]["json"])["label"]}
    for key in ("000010", "000011"):
        assert records[key].fields == {}
        assert records[key].caption == rows[int(key)][1]["txt"].decode()
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    for key, kind in (("000007", "caption"), ("000010", "metadata"), ("000011", "metadata")):
        assert any(f"00000.tar: {key}: broken {kind}" in message for _, message in said)
    counted = [message for level, message in said if level == "WARNING" and "image(s)" in message]
    assert sorted(counted) == [
        "1 image(s) embedded without a part that is unusable: broken caption",
        "2 image(s) embedded without a part that is unusable: broken metadata",
    ]
    assert records["000008"].caption == ""
    assert records["000009"].fields == {}
    assert index.image(records["000003"].number) == sample(3)[1]["png"]


def test_a_caption_in_broken_metadata_is_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [sample(number) for number in range(3)]
    rows[1][1]["json"] = b"{"
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "00000.tar", rows)
    write_model(tmp_path / "model")
    _again(tmp_path, tmp_path / "index", caption_key="json:label")
    index = SearchIndex.open(tmp_path / "index")
    expected = [
        json.loads(rows[0][1]["json"])["label"],
        "",
        json.loads(rows[2][1]["json"])["label"],
    ]
    assert [index.record(number).caption for number in range(3)] == expected
    assert [message for message in caplog.messages if "image(s)" in message] == [
        "1 image(s) embedded without a part that is unusable: broken metadata"
    ]


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_where_the_folder_should_be(tmp_path: Path, below: str) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(ValueError, match=r"--out needs a folder, and .*/out is none"):
        embed("no shards", tmp_path / "no model", tmp_path / "out" / below, SETTINGS)


def test_no_image_that_can_be_used(tmp_path: Path) -> None:
    rows = [sample(number) for number in range(3)]
    for _, members in rows:
        members["png"] = b"no image"
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "00000.tar", rows)
    write_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"not one image of .*quarantine.jsonl says why"):
        _again(tmp_path, tmp_path / "index")


def test_a_shard_that_cannot_be_read_is_no_fault_of_its_samples(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "shards", tmp_path / "shards")
    shutil.copytree(whole / "model", tmp_path / "model")
    original = module.index_shards

    def vanish(pattern: str, needs: tuple[str, ...]) -> Any:
        index = original(pattern, needs=needs)
        len([index[number] for number in range(len(index))])
        (tmp_path / "shards" / "00002.tar").write_bytes(b"")
        return index

    monkeypatch.setattr(module, "index_shards", vanish)
    with pytest.raises(OSError, match="goes on from here"):
        _again(tmp_path, tmp_path / "index")


def test_shards_on_another_machine(whole: Path, tmp_path: Path) -> None:
    remote.configure(str(tmp_path / "cache"), 1.0, 0, 30.0)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for shard in (whole / "shards").iterdir():
            server.files[f"/{shard.name}"] = shard.read_bytes()
        address = f"{server.url}/{{00000..00002}}.tar"
        embed(f"{address}?key=secret", whole / "model", tmp_path / "index", SETTINGS)
        index = SearchIndex.open(tmp_path / "index")
        assert index.image(33) == sample(33)[1]["png"]
        assert index.record(33).shard == f"{server.url}/00002.tar"
        assert b"secret" not in b"".join(_contents(tmp_path / "index").values())
        local = SearchIndex.open(tmp_path / "index", shards_root=whole / "shards")
        assert local.image(17) == sample(17)[1]["png"]
        server.faults["/00001.tar"] = ["never 503"]
        with pytest.raises(OSError, match=r"00001.tar"):
            index.image(17)
    finally:
        server.shutdown()
        remote.configure("", 100, 5, 60)


def test_ivf_needs_enough_images(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="48 images are too few for lists"):
        _again(whole, tmp_path, vectors="ivf")


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("workers", 0), ("caption_key", "caption"), ("fields", ("a=b",))],
)
def test_settings_that_are_none(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=str(field) if field != "fields" else "a=b"):
        EmbedSettings(**{field: value})
