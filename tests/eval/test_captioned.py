"""Captioned data sets: what their descriptions may say, and their rows among the benchmark's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluating import evaluator
from fastclip.benchmark_run import evaluate_datasets
from fastclip.distributed.runtime import Runtime
from fastclip.eval import benchmark
from fastclip.eval.benchmark import Protocol, Row, run_benchmark
from fastclip.eval.benchmark_table import format_rows, summary
from fastclip.eval.captioned import CaptionedDataset
from fastclip.eval.datasets import format_datasets, paper_retrieval
from fastclip.eval.layout import find_datasets, open_dataset
from fastclip.eval.retrieval import RetrievalTask, retrieval
from fastclip.models.clip import Clip
from fastclip.models.interop import export_weights
from fastclip.models.presets import preset
from labelled_sets import describe, write_folders
from ranks import run_ranks
from shards import sample, write_tar

ALONE = Runtime.alone(torch.device("cpu"))


def _model() -> Clip:
    torch.manual_seed(3)
    return Clip(preset("ViT-Nano-8")).eval()


def _write(root: Path, name: str, images: int = 9, **fields: Any) -> None:
    """A set whose images have an English caption and, but for one of them, a German one."""
    rows = []
    for number in range(images):
        key, members = sample(number)
        about = {} if number == 4 else {"de": f"Bild {number % 6}"}
        rows.append((key, {**members, "json": json.dumps(about).encode()}))
    (root / name / "test").mkdir(parents=True)
    write_tar(root / name / "test" / "0.tar", rows)
    describe(root / name, **{"captions": {"en": "txt", "de": "json:de"}, **fields})


def _run(
    runtime: Runtime, root: Path, compared: str | None = None, scale: bool = False
) -> list[Row]:
    rows = run_benchmark(
        evaluator(_model(), runtime),
        root,
        names=find_datasets(root),
        protocol=Protocol(linear_probe=True),
        preset=compared,
        same_scale=scale,
    )
    for row in rows:
        row.seconds = 0.0
    return rows


def test_a_row_has_what_retrieval_gives_for_each_of_the_captions(tmp_path: Path) -> None:
    _write(tmp_path, "shapes", title="Shapes", note="drawn")
    (row,) = _run(ALONE, tmp_path)
    assert not row.failures
    assert (row.title, row.note, row.images, row.left_out) == ("Shapes", "drawn", 9, 0)
    assert row.retrieval is not None
    assert list(row.retrieval) == ["en", "de"]
    for name, key, count in (("en", "txt", 9), ("de", "json:de", 8)):
        task = RetrievalTask(name=name, shards=str(tmp_path / "shapes" / "test"), caption_key=key)
        with torch.no_grad():
            expected = retrieval(evaluator(_model(), ALONE), task)
        assert row.retrieval[name] == expected
        assert expected["images"] == count
    assert row.retrieval["de"]["texts"] == 5
    for rows in run_ranks(_run, 2, tmp_path.parent, tmp_path):
        assert rows == [row]


def test_tables_hold_both_kinds(tmp_path: Path) -> None:
    write_folders(tmp_path / "colours" / "test", images=2)
    describe(tmp_path / "colours")
    _write(tmp_path, "flickr30k", captions="txt")
    _write(tmp_path, "shapes")
    rows = _run(ALONE, tmp_path, "ViT-L-14-336")
    assert [row.dataset for row in rows] == ["colours", "flickr30k", "shapes"]
    labelled, captioned = format_rows(rows, "ViT-L-14-336").split("\n\n")
    assert [line.split()[0] for line in labelled.splitlines()] == ["data", "colours"]
    lines = captioned.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["flickr30k", "captions"],
        ["flickr30k", "ViT-L-14-336"],
        ["shapes", "en"],
        ["shapes", "de"],
    ]
    assert lines[2].split()[4:7] == ["88.00%", "98.70%", "99.40%"]
    assert lines[2].endswith("≠ data, prompt, scale")
    assert "flickr30k: data: 9 test images, the paper's 1,000" in captioned
    assert "Tables 10, 11 and 13" in captioned
    assert summary(rows).startswith("3 data set(s), zero-shot ")
    alone = format_rows(rows[2:], None)
    assert alone.splitlines()[0].split()[:4] == ["data", "set", "captions", "images"]


def _paper(**changes: float) -> dict[str, dict[str, dict[str, float]]]:
    return {"ViT-L-14-336": {"mscoco": {**paper_retrieval()["ViT-L-14-336"]["mscoco"], **changes}}}


def test_the_papers_recalls() -> None:
    (found,) = paper_retrieval().values()
    assert {name: list(recalls.values()) for name, recalls in found.items()} == {
        "flickr30k": pytest.approx([1000, 5000, 0.88, 0.987, 0.994, 0.687, 0.906, 0.952]),
        "mscoco": pytest.approx([5000, 25000, 0.584, 0.815, 0.881, 0.378, 0.624, 0.722]),
    }


def test_the_papers_recalls_are_compared_where_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, "mscoco", captions="txt")
    (other,) = _run(ALONE, tmp_path, "RN50", True)
    assert other.paper_retrieval is None  # Table 13 has one model
    assert not other.comparable
    (row,) = _run(ALONE, tmp_path, "ViT-L-14-336")
    assert row.retrieval_differs == (
        "data: 9 test images, the paper's 5,000",
        "data: 1.0 captions of an image, the paper's 5",
        "prompt: texts are asked for as {}, in the paper as a photo of {}",
        "scale: this model is no ViT-L-14-336",
    )
    assert not row.comparable

    five = {"captions": "txt", "caption_lines": True, "templates": ["a photo of {}"]}
    rows = [(key, {**m, "txt": b"\n".join([m["txt"]] * 5)}) for key, m in map(sample, range(9))]
    write_tar(tmp_path / "mscoco" / "test" / "0.tar", rows)
    describe(tmp_path / "mscoco", **five)
    monkeypatch.setattr(benchmark, "paper_retrieval", lambda: _paper(images=9.0))
    (row,) = _run(ALONE, tmp_path, "ViT-L-14-336", True)
    assert row.retrieval_differs == ()
    assert row.comparable
    for _, members in rows[:2]:
        del members["txt"]
    write_tar(tmp_path / "mscoco" / "test" / "0.tar", rows)
    (row,) = _run(ALONE, tmp_path, "ViT-L-14-336", True)
    assert (row.images, row.left_out) == (7, 2)
    assert row.retrieval_differs == ("data: 7 test images, the paper's 9",)
    assert "mscoco: 2 of the test split left out" in format_rows([row], "ViT-L-14-336")


def test_a_description_says_how_texts_are_asked_for(tmp_path: Path) -> None:
    _write(tmp_path, "shapes", captions="txt", templates=["a blurred {}"], images=23)
    (row,) = _run(ALONE, tmp_path)
    shards = str(tmp_path / "shapes" / "test")
    with torch.no_grad():
        asked, bare = (
            retrieval(
                evaluator(_model(), ALONE), RetrievalTask(name="x", shards=shards, template=each)
            )
            for each in ("a blurred {}", "{}")
        )
    assert asked != bare
    assert row.retrieval == {"captions": asked}


def test_captions_that_fail_leave_the_others_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, "shapes", captions={"en": "txt", "fr": "json:fr", "de": "json:de"})
    with (tmp_path / "shapes" / "test" / "0.tar").open("r+b") as shard:
        shard.truncate(shard.seek(0, 2) - 11_000)  # the last samples are cut off
    (row,) = _run(ALONE, tmp_path)
    assert row.retrieval is not None
    assert list(row.retrieval) == ["en", "de"]
    assert len(row.failures) == 1
    assert row.failures[0].startswith("fr: retrieval task fr: no image of")
    assert row.left_out > 0
    assert "0.tar" in caplog.text
    table = format_rows([row], None)
    assert [line.split()[1] for line in table.splitlines()[1:3]] == ["en", "de"]
    assert "shapes failed: fr: " in table


def test_results_go_into_the_file(tmp_path: Path) -> None:
    root = tmp_path / "sets"
    _write(root, "shapes", captions="txt", templates=["a photo of {}"])
    model = _model()
    export_weights(model, model.config, tmp_path / "model", layout="fastclip")
    found = evaluate_datasets(tmp_path / "model", root, protocol=Protocol(), device="cpu")
    found.write_json(tmp_path / "results.json")
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["retrieval"]["captions"]["images"] == 9
    assert row["zero_shot"] is None
    assert found.table().splitlines()[1].split()[:4] == ["shapes", "captions", "9", "9"]


def test_a_set_that_cannot_be_read_is_a_row_with_the_reason(tmp_path: Path) -> None:
    _write(tmp_path, "a", captions="json:fr")
    _write(tmp_path, "b")
    (tmp_path / "b" / "test" / "0.tar").unlink()
    _write(tmp_path, "c")
    a, b, c = _run(ALONE, tmp_path)
    assert "no image of" in a.failures[0]
    assert "under json:fr" in a.failures[0]
    assert len(b.failures) == 1
    assert str(tmp_path / "b" / "test") in b.failures[0]
    assert not c.failures
    table = format_rows([a, b, c], None)
    assert "a failed: captions: retrieval task captions" in table
    assert table.count("–  ") > 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"captions": 3}, 'captions are "txt", "json:field", or several.*, not 3'),
        ({"captions": None}, "captions are .*, not None"),
        ({"captions": {}}, "captions are .*; there are none"),
        ({"captions": {"en": ["txt"]}}, r"captions are .*, not \['txt'\]"),
        ({"captions": "text"}, "captions are .*, not 'text'"),
        ({"captions": {"en": "json:"}}, "captions are .*, not 'json:'"),
        ({"captions": {"a/b": "txt"}}, "a name of captions is not empty and has no /: 'a/b'"),
        ({"captions": {"": "txt"}}, "a name of captions is not empty"),
        ({"metric": ["accuracy"]}, r"metric is accuracy, .* not \['accuracy'\]"),
        ({"metric": "accuracy"}, "metric is of labelled data sets; this one has captions"),
        ({"classes": ["a"]}, "classes is of labelled data sets"),
        ({"caption_lines": "yes"}, "caption_lines, .* is true or false, not 'yes'"),
        ({"templates": ["{}", "a {}"]}, r'a single one, \["a photo of \{\}"\]'),
        ({"templates": "imagenet"}, "a single one"),
        ({"templates": ["a photo"]}, "does not hold exactly one"),
        ({"splits": {"train": "test", "test": "test"}}, "there is one split, test"),
    ],
)
def test_descriptions_that_say_something_else(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    _write(tmp_path, "shapes", **fields)
    with pytest.raises(ValueError, match=message) as raised:
        open_dataset(tmp_path, "shapes")
    assert str(tmp_path / "shapes" / "dataset.json") in str(raised.value)


def test_captioned_sets_are_described_and_in_shards(tmp_path: Path) -> None:
    (tmp_path / "flickr30k" / "test").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no dataset.json: write there where the captions are"):
        open_dataset(tmp_path, "flickr30k")
    write_folders(tmp_path / "flickr30k" / "test", images=1)
    describe(tmp_path / "flickr30k", captions="txt")
    with pytest.raises(ValueError, match=r"test holds no \*.tar: images and their captions"):
        open_dataset(tmp_path, "flickr30k")


def test_captions_of_one_kind_and_lines_without_captions(tmp_path: Path) -> None:
    _write(tmp_path, "shapes", captions="txt", caption_lines=True, splits={"test": "test"})
    found = open_dataset(tmp_path, "shapes", ("train", "val", "test"))
    assert isinstance(found, CaptionedDataset)
    assert len(found.source) == 9
    (task,) = found.tasks.values()
    assert (task.name, task.caption_lines, task.template) == ("captions", True, "{}")
    write_folders(tmp_path / "colours" / "test", images=1)
    describe(tmp_path / "colours", caption_lines=True)
    with pytest.raises(ValueError, match="caption_lines goes with captions"):
        open_dataset(tmp_path, "colours")
    assert '"captions": {"en": "txt", "de": "json:caption_de"}' in format_datasets()
