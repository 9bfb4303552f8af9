"""Data sets in folders: splits of class folders, or of shards with labels or captions; `LAYOUT`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.data.image_folder import FolderIndex, index_folder
from fastclip.data.index import ShardIndex, index_shards
from fastclip.eval.captioned import CaptionedDataset, check_captioned, open_captioned
from fastclip.eval.class_names import (
    DEFAULT_FIELD,
    ClassNames,
    Labels,
    name_classes,
    read_classes,
    read_json,
)
from fastclip.eval.datasets import CAPTIONED, PaperDataset, nearest, paper_datasets
from fastclip.eval.measures import ACCURACY, METRICS, Metric
from fastclip.eval.prompts import check_templates, imagenet_templates

logger = logging.getLogger("fastclip")

SPLITS = ("train", "val", "test")

_DESCRIPTION = "dataset.json"
_DEFAULT_TEMPLATES = ("a photo of a {}.",)
_FIELDS = (
    "title", "metric", "templates", "classes", "label_field", "splits", "unlabelled", "paper",
    "note", "captions", "caption_lines",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images of a data set, and how to read their labels."""

    source: ShardIndex | FolderIndex
    labels: Labels


@dataclass(frozen=True, kw_only=True)
class LabelledDataset:
    """A data set that models are measured on."""

    name: str
    """Of its folder."""

    title: str
    metric: Metric
    templates: tuple[str, ...]
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    """Those that were asked for and are there, by name."""

    paper: PaperDataset | None
    """The one of the paper's that it is."""

    note: str


def find_datasets(root: Path, names: Sequence[str] | None = None) -> list[str]:
    """Data sets below `root`: those named, or all, the paper's first and in its order.

    All are the folders of a paper's name, with a dataset.json, or with a split; others are said to
    be passed over.

    Raises:
        FileNotFoundError: there is no such folder, or no data set in it.
        ValueError: a name occurs twice.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    if names is not None:
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"a data set is a folder's name below {root}, not {name!r}")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated or not names:
            raise ValueError(f"data sets are named once each: {', '.join(repeated) or 'none is'}")
        return list(names)
    found = []
    for folder in sorted(_folders(root)):
        if folder in paper_datasets() or any(
            (root / folder / part).exists() for part in (_DESCRIPTION, *SPLITS)
        ):
            found.append(folder)
        else:
            logger.info("passed over %s: it holds no split and no %s", root / folder, _DESCRIPTION)
    if not found:
        raise FileNotFoundError(
            f"{root} holds no data set: fastclip eval --list-datasets says how they are laid out"
        )
    order = list(paper_datasets())
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def open_dataset(
    root: Path, name: str, splits: Collection[str] = SPLITS
) -> LabelledDataset | CaptionedDataset:
    """The data set in the folder `name` of `root`.

    Args:
        splits: those whose images are to be found; others are not looked through. Of a captioned
            data set there is one, test.

    Raises:
        FileNotFoundError: there is no such folder, no test split, or a file that is named is
            missing.
        ValueError: the name is unknown, a file's content or the layout is not as described, or a
            class folder or split is empty.
        OSError: something cannot be read.
    """
    folder = root / name
    if not folder.is_dir():
        known = [*paper_datasets(), *CAPTIONED, *_folders(root)]
        raise FileNotFoundError(f"there is no folder {folder}{nearest(name, known)}")
    described = (folder / _DESCRIPTION).is_file()
    about = _read_description(folder / _DESCRIPTION) if described else {}
    if "captions" in about:
        place = _places(folder, about.get("splits"))["test"]
        if _is_image_folder(place):
            raise ValueError(f"{place} holds no *.tar: images and their captions are in shards")
        _check_shards(place)
        return open_captioned(folder, about, place)
    paper = _paper(folder, about.get("paper", name if name in paper_datasets() else None))
    if name in CAPTIONED and not described:
        raise ValueError(
            f"{folder} has no {_DESCRIPTION}: write there where the captions are, "
            '{"captions": "txt"}'
        )
    if paper is None and not described:
        raise ValueError(
            f"{folder} is none of the paper's data sets{nearest(name, paper_datasets())} and has "
            f"no {_DESCRIPTION}: fastclip eval --list-datasets says what to write there"
        )
    metric = METRICS[about["metric"]] if "metric" in about else None
    metric = metric or (paper.metric if paper else ACCURACY)
    places = _places(folder, about.get("splits"))
    folders = sorted({each for place in places.values() for each in _class_folders(place)})
    field, classes = _classes(folder, about, folders, paper)
    return LabelledDataset(
        name=name,
        title=about.get("title", paper.title if paper else name),
        metric=metric,
        templates=_templates(about, paper),
        classes=classes.names,
        splits={
            split: _open_split(
                place, classes, field, metric, skip=about.get("unlabelled") == "skip"
            )
            for split, place in places.items()
            if split in splits
        },
        paper=paper,
        note=about.get("note", paper.note if paper else ""),
    )


def _read_description(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is an object with fields {', '.join(_FIELDS)}")
    for name, value in content.items():
        if name not in _FIELDS:
            raise ValueError(f"{path}: there is no field {name!r}{nearest(name, _FIELDS)}")
        if name in ("title", "label_field", "note") and not isinstance(value, str):
            raise ValueError(f"{path}: {name} is a text, not {value!r}")
    if content.get("unlabelled", "refuse") not in ("refuse", "skip"):
        raise ValueError(f"{path}: unlabelled is refuse or skip, not {content['unlabelled']!r}")
    metric = content.get("metric", "accuracy")
    if not isinstance(metric, str) or metric not in METRICS:
        hint = nearest(str(metric), METRICS)
        raise ValueError(f"{path}: metric is {', '.join(METRICS)}, not {metric!r}{hint}")
    splits = content.get("splits", {"test": "test"})
    if not isinstance(splits, dict) or not all(isinstance(p, str) and p for p in splits.values()):
        raise ValueError(f'{path}: splits are {{"train": place, "val": place, "test": place}}')
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"{path}: splits are {', '.join(SPLITS)}, not {split!r}")
    templates = content.get("templates", "imagenet")
    if templates != "imagenet":
        if not isinstance(templates, list) or not all(isinstance(t, str) for t in templates):
            raise ValueError(f"{path}: templates are a list of texts, or imagenet")
        check_templates(templates, f"{path}: templates")
    if "captions" in content:
        check_captioned(content, path)
    elif "caption_lines" in content:
        raise ValueError(f"{path}: caption_lines goes with captions, and there are none")
    return content


def _paper(folder: Path, name: Any) -> PaperDataset | None:
    if name is None:
        return None
    if not isinstance(name, str) or name not in paper_datasets():
        raise ValueError(
            f"{folder / _DESCRIPTION}: paper is the name of one of the paper's data sets, not "
            f"{name!r}{nearest(str(name), paper_datasets())}"
        )
    return paper_datasets()[name]


def _templates(about: dict[str, Any], paper: PaperDataset | None) -> tuple[str, ...]:
    if "templates" not in about:
        return paper.templates if paper else _DEFAULT_TEMPLATES
    return imagenet_templates() if about["templates"] == "imagenet" else tuple(about["templates"])


def _places(folder: Path, splits: dict[str, str] | None) -> dict[str, str]:
    """Where each split is: a folder or a list of shards, as `expand_shards` takes it."""
    if splits is None:
        places = {split: str(folder / split) for split in SPLITS if (folder / split).is_dir()}
    else:
        places = {
            split: "::".join(_existing(folder, part) for part in place.split("::"))
            for split, place in splits.items()
        }
    if "test" not in places:
        raise FileNotFoundError(f"{folder} has no split to test on: there is no {folder / 'test'}")
    return places


def _existing(folder: Path, part: str) -> str:
    place = _from(folder, part)
    if "://" not in place and not any(c in place for c in "*?[{") and not os.path.exists(place):
        raise FileNotFoundError(f"{folder / _DESCRIPTION}: splits: there is no {place}")
    return place


def _from(folder: Path, part: str) -> str:
    return part if "://" in part else os.path.normpath(folder / part)


def _is_image_folder(place: str) -> bool:
    path = Path(place)
    return path.is_dir() and not any(path.glob("*.tar"))


def _folders(path: Path) -> list[str]:
    return [
        entry.name
        for entry in os.scandir(path)
        if entry.is_dir() and not entry.name.startswith(".")
    ]


def _class_folders(place: str) -> list[str]:
    if not _is_image_folder(place):
        return []
    found = _folders(Path(place))
    if not found:
        raise ValueError(f"{place} holds neither class folders with images nor *.tar")
    return found


def _check_shards(place: str) -> None:
    """A folder of shards holds nothing else, and its name is no pattern."""
    if not Path(place).is_dir():
        return
    if folders := sorted(_folders(Path(place))):
        raise ValueError(
            f"{place} holds both *.tar and folders (first: {folders[0]}), and either would be the "
            "images: move one of them elsewhere"
        )
    if "::" in place or re.search(r"\{\d+\.\.\d+\}", place):
        raise ValueError(
            f"{place}: :: and numbers in braces mean several lists of shards: give the folder "
            "another name"
        )


def _classes(
    folder: Path, about: dict[str, Any], folders: list[str], paper: PaperDataset | None
) -> tuple[str, ClassNames]:
    """The label field and the classes."""
    path, content = folder / "classes.json", about.get("classes")
    if isinstance(content, str):
        path = Path(_from(folder, content))
        content = read_json(path)
    elif content is not None:
        path = folder / _DESCRIPTION
    elif path.is_file():
        content = read_json(path)
    field = None
    if content is not None:
        field, content = read_classes(content, path)
    classes = name_classes(content, folders, paper.names if paper else {}, str(path))
    return about.get("label_field", field or DEFAULT_FIELD), classes


def _open_split(
    place: str, classes: ClassNames, field: str, metric: Metric, *, skip: bool
) -> Split:
    in_folders = _is_image_folder(place)
    if in_folders:
        source = index_folder(Path(place))
        filled = {key.partition("/")[0] for key in source.keys}
        for loose in filled & set(source.keys):
            raise ValueError(f"{place}: the image {loose} lies in no class folder")
        for empty in sorted(set(_folders(Path(place))) - filled):
            raise ValueError(f"{place}: the class folder {empty} holds no image")
    else:
        _check_shards(place)
        source = index_shards(place, needs=())
    return Split(
        source=source,
        labels=Labels(
            classes=classes,
            field=None if in_folders else field,
            several=metric.several,
            skip=skip,
            where=place,
        ),
    )
