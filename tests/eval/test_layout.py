"""Data sets as they lie in folders: both kinds of splits, names of classes, and every complaint."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.data.eval_loader import EvalBatch, eval_batches
from fastclip.eval.layout import SPLITS, LabelledDataset, Split, find_datasets, open_dataset
from fastclip.eval.measures import ACCURACY, MAP_11_POINT, MEAN_PER_CLASS
from fastclip.eval.prompts import imagenet_templates
from labelled_sets import describe, write_folders, write_labelled
from shards import write_shards


def _open(root: Path, name: str, splits: tuple[str, ...] = SPLITS) -> LabelledDataset:
    dataset = open_dataset(root, name, splits)
    assert isinstance(dataset, LabelledDataset)
    return dataset


def _labels(dataset: LabelledDataset, split: str = "test") -> dict[str, Any]:
    """By sample, of those that are kept."""
    part = dataset.splits[split]
    (batch,) = _batches(part)
    labels, kept = part.labels(batch)
    keys = [key for key, keep in zip(batch.keys, kept.tolist(), strict=True) if keep]
    return dict(zip(keys, labels.tolist(), strict=True))


def _batches(split: Split) -> list[EvalBatch]:
    return list(
        eval_batches(
            split.source,
            image_size=16,
            batch_size=64,
        )
    )


def _names(folder: Path, content: Any) -> None:
    (folder / "classes.json").write_text(json.dumps(content))


def test_class_folders(tmp_path: Path) -> None:
    write_folders(tmp_path / "food101" / "test")
    write_folders(tmp_path / "food101" / "train", ("red", "dark_blue"))
    dataset = _open(tmp_path, "food101")
    assert dataset.classes == ("blue", "dark blue", "green", "red")
    assert set(dataset.splits) == {"train", "test"}
    labels = _labels(dataset)
    assert labels["blue/0.png"] == 0
    assert labels["red/3.png"] == 3
    assert len(labels) == 12
    assert dataset.paper is not None
    assert dataset.metric is ACCURACY
    assert set(_open(tmp_path, "food101", ("test",)).splits) == {"test"}


@pytest.mark.parametrize(
    ("content", "classes", "red"),
    [
        ({"red": "crimson", "green": "lime", "blue": "navy"}, ("navy", "lime", "crimson"), 2),
        (["navy", "lime", "crimson"], ("navy", "lime", "crimson"), 2),
        (["red", "green", "blue", "black"], ("red", "green", "blue", "black"), 0),
        ({"label_field": "x", "classes": ["green", "red", "blue"]}, ("green", "red", "blue"), 1),
    ],
)
def test_names_of_class_folders(
    tmp_path: Path, content: Any, classes: tuple[str, ...], red: int
) -> None:
    write_folders(tmp_path / "dtd" / "test", images=1)
    _names(tmp_path / "dtd", content)
    dataset = _open(tmp_path, "dtd")
    assert dataset.classes == classes
    assert _labels(dataset)["red/0.png"] == red


def test_folders_that_are_numbers(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(12)]
    for first, known in ((0, 12), (1, 12), (0, 13)):  # from 0, from 1, and some without images
        folder = tmp_path / f"{first}-{known}" / "gtsrb"
        write_folders(folder / "test", ("red",), images=1)
        for number in range(first, first + 12):
            shutil.copytree(folder / "test" / "red", folder / "test" / str(number))
        shutil.rmtree(folder / "test" / "red")
        _names(folder, [*names, "class 12"][:known])
        dataset = _open(folder.parent, "gtsrb")
        assert _labels(dataset)[f"{first + 10}/0.png"] == 10


def test_usual_names_of_the_papers_sets(tmp_path: Path) -> None:
    write_folders(tmp_path / "rendered_sst2" / "test", ("red", "blue"), images=1)
    test = tmp_path / "rendered_sst2" / "test"
    for old, new in (("red", "positive"), ("blue", "negative")):
        (test / old).rename(test / new)
    dataset = _open(tmp_path, "rendered_sst2")
    assert dataset.classes == ("negative", "positive")
    assert _labels(dataset) == {"negative/0.png": 0, "positive/0.png": 1}

    write_labelled(tmp_path / "pcam" / "test", [{"label": 1}, {"label": "0"}])
    dataset = _open(tmp_path, "pcam")
    assert dataset.classes[1] == "lymph node tissue with a tumour"
    assert _labels(dataset) == {"0000": 1, "0001": 0}


def test_shards_with_a_classes_file(tmp_path: Path) -> None:
    folder = tmp_path / "cifar100"
    write_shards(folder, pairs=30)
    (folder / "shards").rename(folder / "test")
    dataset = _open(tmp_path, "cifar100")
    assert len(dataset.classes) == 24
    assert _labels(dataset)["000001"] == dataset.classes.index("green circle")


def test_several_labels(tmp_path: Path) -> None:
    abouts: list[dict[str, Any] | None]
    abouts = [{"label": ["dog", "tvmonitor"]}, {"label": "cat"}, {"label": []}, {"label": [0, 1]}]
    write_labelled(tmp_path / "voc2007" / "test", abouts)
    dataset = _open(tmp_path, "voc2007")
    assert dataset.metric is MAP_11_POINT
    (batch,) = _batches(dataset.splits["test"])
    labels, kept = dataset.splits["test"].labels(batch)
    assert labels.dtype == torch.bool
    assert labels.shape == (4, 20)
    assert kept.all()
    found = [[dataset.classes[place] for place in row.nonzero()[:, 0]] for row in labels]
    assert found == [
        ["dog", "television or monitor"],
        ["cat"],
        [],
        ["aeroplane", "bicycle"],
    ]


def test_an_own_data_set(tmp_path: Path) -> None:
    write_labelled(tmp_path / "far" / "shards", [{"kind": "b"}, {"kind": "c"}, {"kind": "a"}, None])
    (tmp_path / "far" / "names.json").write_text('{"label_field": "kind", "classes": ["a", "b"]}')
    describe(
        tmp_path / "sets" / "mine",
        title="Mine",
        metric="mean_per_class",
        templates="imagenet",
        classes="../../far/names.json",
        splits={"test": "../../far/shards/{0..0}.tar", "train": "../../far/shards"},
        unlabelled="skip",
        note="n",
    )
    dataset = _open(tmp_path / "sets", "mine")
    assert (dataset.title, dataset.metric, dataset.note) == ("Mine", MEAN_PER_CLASS, "n")
    assert dataset.templates == imagenet_templates()
    assert dataset.paper is None
    assert _labels(dataset) == _labels(dataset, "train") == {"0000": 1, "0002": 0}


def test_a_paper_set_under_another_name(tmp_path: Path) -> None:
    write_folders(tmp_path / "pets-small" / "test", images=1)
    describe(tmp_path / "pets-small", paper="oxford_pets", templates=["{}"])
    dataset = _open(tmp_path, "pets-small")
    assert dataset.paper is not None
    assert dataset.metric is MEAN_PER_CLASS
    assert dataset.templates == ("{}",)


def test_unlabelled_samples_are_refused_by_name(tmp_path: Path) -> None:
    for name, about, message in (
        ("a", None, r"sample 0001 has no 'label' in its json.*skip"),
        ("b", {"label": "z"}, "sample 0001 has label='z', which is none of the 2 classes"),
        ("c", {"label": 2}, "sample 0001 has label=2, which is none"),
        ("d", {"label": True}, "label=True"),
        ("e", {"label": ["x"]}, "several labels.*map_11_point"),
    ):
        write_labelled(tmp_path / name / "test", [{"label": "x"}, about])
        describe(tmp_path / name, classes=["x", "y"])
        dataset = _open(tmp_path, name)
        with pytest.raises(ValueError, match=message):
            _labels(dataset)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrik": "accuracy"}, r"no field 'metrik' \(did you mean metric\?\)"),
        ({"metric": "acuracy"}, r"not 'acuracy' \(did you mean accuracy\?\)"),
        ({"metric": ["accuracy"]}, r"metric is accuracy, .*, not \['accuracy'\]"),
        ({"paper": {}}, r"paper is the name of one of the paper's data sets, not \{\}"),
        ({"title": 3}, "title is a text"),
        ({"unlabelled": "drop"}, "refuse or skip"),
        ({"splits": {"tests": "test"}}, "splits are train, val, test, not 'tests'"),
        ({"splits": ["test"]}, "splits are {"),
        ({"templates": ["no place"]}, "templates: 'no place' does not hold"),
        ({"templates": "papers"}, "list of texts, or imagenet"),
        ({"paper": "food-101"}, r"not 'food-101' \(did you mean food101\?\)"),
        ({"classes": []}, "not empty"),
        ({"classes": ["a", "a", "b"]}, "occur twice: a"),
        ({"classes": ["a", "b"]}, "3 class folders and 2 names, and the folder blue is none"),
        ({"classes": {"red": "r", "blue": "b"}}, "the folder green has no name"),
        ({"classes": {"label_field": 3, "classes": ["a"]}}, "label_field is a text"),
    ],
)
def test_descriptions_that_are_none(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_folders(tmp_path / "mine" / "test", images=1)
    describe(tmp_path / "mine", **fields)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, "mine")


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    folder = tmp_path / "food101"
    with pytest.raises(FileNotFoundError, match=r"no folder .*fod101 \(did you mean food101\?\)"):
        open_dataset(tmp_path, "fod101")
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="no split to test on"):
        open_dataset(tmp_path, "food101")
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match="holds neither class folders"):
        open_dataset(tmp_path, "food101")
    write_folders(folder / "test", images=1)
    (folder / "test" / "empty").mkdir()
    (folder / "test" / "empty" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="the class folder empty holds no image"):
        open_dataset(tmp_path, "food101")
    shutil.rmtree(folder / "test" / "empty")
    shutil.copy(folder / "test" / "red" / "0.png", folder / "test" / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png lies in no class folder"):
        open_dataset(tmp_path, "food101")
    (folder / "classes.json").write_text("[")
    with pytest.raises(ValueError, match=r"classes\.json is not valid JSON"):
        open_dataset(tmp_path, "food101")


def test_shards_without_names_of_classes(tmp_path: Path) -> None:
    write_labelled(tmp_path / "food101" / "test", [{"label": 0}])
    with pytest.raises(ValueError, match=r"a classes\.json has to say"):
        open_dataset(tmp_path, "food101")


def test_a_misspelled_folder(tmp_path: Path) -> None:
    write_folders(tmp_path / "fod101" / "test", images=1)
    with pytest.raises(ValueError, match=r"none of the paper's data sets \(did you mean food101"):
        open_dataset(tmp_path, "fod101")


def test_finding_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("zoo/test", "imagenet", "food101", ".hidden/test", "downloads"):
        (tmp_path / name).mkdir(parents=True)
    describe(tmp_path / "aunt")
    with caplog.at_level(logging.INFO):
        assert find_datasets(tmp_path) == ["food101", "imagenet", "aunt", "zoo"]
    assert "passed over" in caplog.text
    assert "downloads" in caplog.text
    assert find_datasets(tmp_path, ["zoo", "nowhere"]) == ["zoo", "nowhere"]
    with pytest.raises(ValueError, match="once each: zoo"):
        find_datasets(tmp_path, ["zoo", "zoo"])
    with pytest.raises(FileNotFoundError, match="holds no data set"):
        find_datasets(tmp_path / "downloads")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_datasets(tmp_path / "x")


def test_shards_among_class_folders_are_refused(tmp_path: Path) -> None:
    """Either would be read, and the other left out without a word."""
    write_folders(tmp_path / "food101" / "test")
    write_labelled(tmp_path / "own", [{"label": "red"}])
    shutil.copy(tmp_path / "own" / "0.tar", tmp_path / "food101" / "test")
    _names(tmp_path / "food101", ["blue", "green", "red"])
    with pytest.raises(ValueError, match=r"holds both \*\.tar and folders \(first: blue\)"):
        open_dataset(tmp_path, "food101")


@pytest.mark.parametrize("name", ["a::b", "a{0..1}"])
def test_a_folder_whose_name_is_a_pattern(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    write_labelled(root / "food101" / "test", [{"label": "red"}])
    _names(root / "food101", ["blue", "green", "red"])
    with pytest.raises(ValueError, match="give the folder another name"):
        open_dataset(root, "food101")


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    describe(tmp_path / "own", splits={"test": "../gone/test"})
    with pytest.raises(FileNotFoundError, match=r"dataset\.json: splits: there is no .*gone/test"):
        open_dataset(tmp_path, "own")


def test_a_long_label_is_told_short(tmp_path: Path) -> None:
    write_labelled(tmp_path / "food101" / "test", [{"label": "x" * 100_000}])
    _names(tmp_path / "food101", ["red"])
    with pytest.raises(ValueError, match="none of the 1 classes") as caught:
        _labels(_open(tmp_path, "food101"))
    assert len(str(caught.value)) < 500


def test_names_stay_below_the_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a folder's name below .*, not '\.\./own'"):
        find_datasets(tmp_path, ["../own"])
