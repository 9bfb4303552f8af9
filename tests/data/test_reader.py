"""One sample's captions, label and bytes, and what is said when they cannot be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fastclip.data.decode import BadSampleError
from fastclip.data.index import index_shards
from fastclip.data.quarantine import Quarantine
from fastclip.data.reader import Members, caption_id, sentences
from shards import picture, sample, write_tar


def _members(folder: Path, needs: tuple[str, ...] = (), **members: bytes) -> Members:
    path = write_tar(folder / "a.tar", [("a", {"png": picture("red", "bar", 0), **members})])
    return Members(index_shards(str(path), needs=needs)[0])


def _kind(members: Members, caption_key: str) -> str:
    with pytest.raises(BadSampleError) as caught:
        members.captions(caption_key)
    return f"{caught.value.kind}|{caught.value}"


def test_bytes_are_the_members(tmp_path: Path) -> None:
    members = _members(tmp_path, txt=b"x", json=b'{"n": 1}')
    assert members.image == picture("red", "bar", 0)
    assert members.metadata() == {"n": 1}
    assert _members(tmp_path, txt=b"x").metadata() == {}


def test_captions_of_both_members(tmp_path: Path) -> None:
    about = {"text": "in json", "texts": ["one", " ", "two"]}
    members = _members(tmp_path, txt="größer 🦊".encode(), json=json.dumps(about).encode())
    assert members.captions("txt") == ["größer 🦊"]
    assert members.captions("json:text") == ["in json"]
    assert members.captions("json:texts") == ["one", "two"]  # blank ones are never drawn


@pytest.mark.parametrize("text", [b"", b" \n\t", "\u00a0".encode()])
def test_an_empty_caption_is_missing(tmp_path: Path, text: bytes) -> None:
    assert _kind(_members(tmp_path, txt=text), "txt").startswith("missing caption|")


@pytest.mark.parametrize("value", [None, 3, [], [""], ["a", 4], {"en": "a"}])
def test_a_json_caption_that_is_no_text_is_missing(tmp_path: Path, value: object) -> None:
    members = _members(tmp_path, json=json.dumps({"text": value}).encode())
    said = _kind(members, "json:text")
    assert said.startswith("missing caption|")
    assert "json:text" in said
    assert _kind(members, "json:other").startswith("missing caption|")


def test_a_caption_that_is_not_utf8_is_not_guessed_at(tmp_path: Path) -> None:
    said = _kind(_members(tmp_path, txt="Gruß".encode("latin-1")), "txt")
    assert said.startswith("broken caption|")
    assert "0xdf" in said


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b'"a"', b"[" * 100_000])
def test_broken_metadata(tmp_path: Path, content: bytes) -> None:
    members = _members(tmp_path, txt=b"x", json=content)
    with pytest.raises(BadSampleError) as caught:
        members.metadata()
    assert caught.value.kind == "broken metadata"
    assert members.captions("txt") == ["x"]  # it costs only those who need it


def test_a_shard_that_changes_under_the_run(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [sample(0)])
    found = index_shards(str(path))[0]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadSampleError, match="shorter than it was") as caught:
        Members(found)
    assert caught.value.kind == "unreadable"


def test_a_shard_that_vanishes_before_it_is_opened(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [sample(0)])
    found = index_shards(str(path))[0]
    path.unlink()
    with pytest.raises(BadSampleError, match=r"a\.tar: No such file") as caught:
        Members(found)
    assert caught.value.kind == "unreadable"


def test_a_shard_that_is_deleted_while_it_is_open_stays_readable(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [sample(0), sample(1)])
    index = index_shards(str(path))
    before = bytes(Members(index[0]).image)
    path.unlink()
    assert Members(index[0]).image == before
    write_tar(path, [sample(2)])  # and another of its name is another one
    assert Members(index_shards(str(path))[0]).image == sample(2)[1]["png"]


def test_a_shard_with_something_else_at_the_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [sample(0), sample(1)])
    found = index_shards(str(path))[1]
    content = bytearray(path.read_bytes())
    offset = found.image[0]
    content[offset - 512 + 124 : offset - 512 + 135] = b"00000000007"
    path.write_bytes(content)
    with pytest.raises(BadSampleError, match="is not what it was when it was indexed"):
        Members(found)


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("one", ["one"]),
        ("One. Two! Three? Four; five", ["One.", "Two!", "Three?", "Four;", "five"]),
        ("at 3.5 metres", ["at 3.5 metres"]),
        ("\n a\n \n b \n", ["a", "b"]),
        ("...", ["..."]),
    ],
)
def test_sentences(caption: str, parts: list[str]) -> None:
    assert sentences(caption) == parts


def test_caption_ids_are_stable_and_fit_an_int64() -> None:
    assert caption_id("A  Red\tFox ") == caption_id("a red fox")
    captions = [f"caption {number}" for number in range(2000)]
    identities = [caption_id(caption) for caption in captions]
    assert len(set(identities)) == 2000
    assert all(0 <= identity < 2**63 for identity in identities)
    assert max(identities) > 2**62
    assert caption_id("\ud800") >= 0  # JSON may hold half a surrogate pair
    # Ids of different ranks are compared: no process may salt them, unlike hash().
    assert caption_id("a red fox") == 8309146513499429276


def test_bad_samples_are_named_once_and_counted_as_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="fastclip")
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", [sample(0)])
    index = index_shards(f"{tmp_path}/x::{tmp_path}/y")  # one name, one key, two samples
    bad = Quarantine()
    assert bad.fraction == 0
    for _ in range(3):
        bad.bad(index[0], BadSampleError("broken image", "cut"))
        bad.good()
    bad.bad(index[1], BadSampleError("missing caption", "blank"))
    assert bad.counts == {"broken image": 1, "missing caption": 1}
    assert bad.total == 2
    assert bad.fraction == 4 / 7
    assert [record.message for record in caplog.records] == [
        "left out 0.tar: 000000: broken image: cut",
        "left out 0.tar: 000000: missing caption: blank",
    ]
