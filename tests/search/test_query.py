"""The verbs `fastclip search` and `fastclip embed`: queries, answers, and what is refused."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastclip.cli_search import add_search_verbs
from fastclip.printing import printable
from fastclip.search.encoder import Encoder
from fastclip.search.index import SearchIndex
from fastclip.search.query import (
    Query,
    format_found,
    open_encoder,
    parse_filters,
    query_features,
    read_query,
)
from indexed import write_index, write_model
from shards import picture, sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("query")
    write_index(made, pairs=30)
    return made


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder / "model")


def _run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_search_verbs(parser.add_subparsers(required=True))
    options = parser.parse_args([str(word) for word in words])
    return options.run(options)


def _bomb(side: int) -> bytes:
    """A PNG whose header says side × side, of a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


def test_texts_have_the_models_features(encoder: Encoder) -> None:
    texts = [f"a {number} thing" for number in range(300)]
    found = encoder.texts(texts)
    with torch.no_grad():
        expected = encoder.model(tokens=encoder.tokenizer(texts[250:260])).text_features
    torch.testing.assert_close(found[250:260], expected)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(300))
    assert encoder.texts([]).shape == (0, encoder.embed_dim)
    assert encoder.images([]).shape == (0, encoder.embed_dim)


@pytest.mark.parametrize("text", ["", " \n"])
def test_blank_texts_are_refused(encoder: Encoder, text: str) -> None:
    with pytest.raises(ValueError, match="text 2 to search for is empty"):
        encoder.texts(["a", text])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"GIF89a", "broken image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        (b"<svg/>", "not an image"),
        (_bomb(60_000), "exceed"),
        (_bomb(8_000), r"8000×8000 exceeds 50000000 pixels"),
        (picture("red", "circle", 0)[:200], "broken image"),
    ],
)
def test_images_that_are_none(encoder: Encoder, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.image_bytes(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_of_shards_can_be_searched_with(encoder: Encoder, kind: str) -> None:
    file = io.BytesIO()
    Image.effect_noise((90, 70), 60).convert("RGB").save(file, kind)
    feature = encoder.image_bytes(file.getvalue())
    assert feature.shape == (encoder.embed_dim,)
    assert float(feature.norm()) == pytest.approx(1, abs=1e-5)


def test_a_file_is_an_image_and_another_word_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dog").write_bytes(b"content")
    Path("folder").mkdir()
    assert read_query("dog") == Query("dog", b"content")
    assert read_query("dog", "text") == Query("dog")
    assert read_query("cat") == Query("cat")
    assert read_query("x" * 5000) == Query("x" * 5000)
    with pytest.raises(FileNotFoundError, match="there is no image cat"):
        read_query("cat", "image")
    with pytest.raises(ValueError, match="folder is not a file"):
        read_query("folder")
    with Path("large").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ValueError, match="large has 67,108,865 bytes"):
        read_query("large")


def test_templates_are_averaged(encoder: Encoder) -> None:
    (found,) = query_features(encoder, [Query("dog")], ("a {}", "two {}s"))
    mean = encoder.texts(["a dog", "two dogs"]).mean(dim=0)
    torch.testing.assert_close(found, F.normalize(mean, dim=0))
    with pytest.raises(ValueError, match="--template"):
        query_features(encoder, [Query("dog")], ("a dog",))
    with pytest.raises(ValueError, match=r"bad.png: the image cannot be used"):
        query_features(encoder, [Query("bad.png", b"?")])


def test_filters_are_written_field_equals_value() -> None:
    assert parse_filters(["style=noto", "label=a=b"]) == {"style": "noto", "label": "a=b"}
    for words in (["style"], ["=noto"], ["style="], ["a=b", "a=c"]):
        with pytest.raises(ValueError, match="field"):
            parse_filters(words)


def test_nothing_in_a_table_moves_the_cursor(folder: Path, encoder: Encoder) -> None:
    assert printable("a\x1b[2Jb\nc\udcff") == "a�[2Jb c�"
    index = SearchIndex.open(folder / "index")
    (found,) = index.search(encoder.texts(["a red bar"]), 3)
    table = format_found(Query("a\x1b[31m"), found, {"label": "x"})
    assert table.isprintable() or "\x1b" not in table
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["1", "2", "3"]
    assert "shards/0000" in table
    assert "nothing" in format_found(Query("a"), [], {})


def test_search(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, sheet = tmp_path / "query.png", tmp_path / "made" / "sheet.png"
    image.write_bytes(sample(7)[1]["png"])
    words = ("search", folder / "index", "a red circle", image, "--k", "4")
    assert _run(*words, "--json", "--sheet", sheet) == 0
    text, picture_ = map(json.loads, capsys.readouterr().out.splitlines())
    assert (text["query"], text["kind"]) == ("a red circle", "text")
    assert (picture_["query"], picture_["kind"]) == (str(image), "image")
    assert [len(answer["found"]) for answer in (text, picture_)] == [4, 4]
    best = picture_["found"][0]
    assert (best["number"], best["key"]) == (7, sample(7)[0])
    assert best["score"] == pytest.approx(1, abs=1e-3)
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    assert _run(*words[:4], "--exact", "--filter", "label=red circle") == 0
    out = capsys.readouterr().out
    assert out.count("a red circle\n") >= 4  # the query's line and captions
    assert "green" not in out


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        ("sheet.jpg", "does not end in .png"),
        ("folder.png", "--sheet is a file, and .*folder.png is a folder"),
        ("file/sheet.png", "--sheet needs a folder, and .*file is none"),
    ],
)
def test_a_sheet_that_cannot_be_written_is_refused_first(
    tmp_path: Path, sheet: str, message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=message):  # not that there is no index
        _run("search", tmp_path / "no index", "dog", "--sheet", tmp_path / sheet)


def test_a_model_that_has_moved_is_named(tmp_path: Path) -> None:
    index = SearchIndex.open(write_index(tmp_path, pairs=4))
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="name the run or checkpoint with --model"):
        open_encoder(index)
    assert open_encoder(index, tmp_path / "moved").digest == index.info.model_digest
    with pytest.raises(ValueError, match="was made with the model"):
        open_encoder(index, write_model(tmp_path / "other", seed=5))


def test_embed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "index"
    words = ("embed", folder / "shards", "--model", folder / "model", "--out", out)
    assert _run(*words, "--batch-size", "7", "--device", "cpu", "--fields", "label") == 0
    assert "30 images of 2 shards, 0 left out" in capsys.readouterr().out
    assert SearchIndex.open(out).info.fields.keys() == {"label"}
    shutil.rmtree(out)
    assert _run(*words, "--device", "cpu", "--fields", "--dtype", "float32") == 0
    assert SearchIndex.open(out).description.dtype == "float32"
    assert SearchIndex.open(out).info.fields == {}
