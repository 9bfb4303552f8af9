"""What the classes of a data set are called, and which of them an image has."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.data.eval_loader import EvalBatch
from fastclip.eval.zero_shot import check_names

DEFAULT_FIELD = "label"


@dataclass(frozen=True)
class ClassNames:
    """The classes in order, and the labels that mean them."""

    names: tuple[str, ...]
    """What prompts call them."""

    places: Mapping[str, int]
    """The class that a label means, a name of a folder or a text in a json member."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels of a batch, as `extract_features` asks for them."""

    classes: ClassNames

    field: str | None
    """Of the json member; None: the label is the folder that the image lies in."""

    several: bool
    """Whether an image may have several classes."""

    skip: bool
    """Leave out images whose label is none of the classes, instead of refusing them."""

    where: str
    """Named in errors."""

    def __call__(self, batch: EvalBatch) -> tuple[Tensor, Tensor]:
        """Labels of the kept rows, int64 [K] or bool [K, C], and which these are, bool [B].

        Raises:
            ValueError: a label is none of the classes; the message names the sample.
        """
        found, kept = [], []
        for key, about in zip(batch.keys, batch.metadata, strict=True):
            label = key.partition("/")[0] if self.field is None else about.get(self.field)
            places = self._places(label)
            if places is None and not self.skip:
                raise ValueError(self._refusal(key, label))
            kept.append(places is not None)
            if places is not None:
                found.append(places)
        mask = torch.tensor(kept, dtype=torch.bool)
        if not self.several:
            return torch.tensor([place for (place,) in found], dtype=torch.int64), mask
        labels = torch.zeros(len(found), len(self.classes.names), dtype=torch.bool)
        for row, places in enumerate(found):
            labels[row, places] = True
        return labels, mask

    def _places(self, label: Any) -> list[int] | None:
        """Of the classes that a label means; None where it means none."""
        if isinstance(label, list) and self.several:
            places = [self._place(one) for one in label]
        else:
            places = [self._place(label)]
        known = [place for place in places if place is not None]
        return known if len(known) == len(places) else None

    def _place(self, label: Any) -> int | None:
        if isinstance(label, str):
            return self.classes.places.get(label)
        if type(label) is int and 0 <= label < len(self.classes.names):
            return label
        return None

    def _refusal(self, key: str, label: Any) -> str:
        known = f"the {len(self.classes.names)} classes"
        if self.field is None:
            return f"{self.where}: sample {key} lies in the folder of none of {known}"
        if label is None:
            return (
                f"{self.where}: sample {key} has no {self.field!r} in its json: say label_field "
                'in classes.json, or in dataset.json "unlabelled": "skip"'
            )
        if isinstance(label, list) and not self.several:
            return (
                f"{self.where}: sample {key} has several labels, {reprlib.repr(label)}, which only "
                "the measure map_11_point takes"
            )
        shown = f"{self.field}={reprlib.repr(label)}"
        return f"{self.where}: sample {key} has {shown}, which is none of {known}"


def read_classes(content: Any, where: str | Path) -> tuple[str | None, Any]:
    """The label field, where it is said, and the names: a list, or a mapping from labels.

    Args:
        content: of a classes file or of the field ``classes`` of a dataset.json.

    Raises:
        ValueError: it is neither a list, nor a mapping, nor {"label_field", "classes"}.
    """
    field = None
    if isinstance(content, dict) and "label_field" in content:
        field, content = content["label_field"], content.get("classes")
        if not isinstance(field, str) or not field:
            raise ValueError(f"{where}: label_field is a text, not {field!r}")
    if not isinstance(content, list | dict) or not content:
        raise ValueError(
            f'{where}: classes are a list of names, an object {{"folder": "name"}}, or '
            f'{{"label_field": "...", "classes": [...]}}, and not empty'
        )
    check_names(list(content.values()) if isinstance(content, dict) else content, where)
    return field, content


def name_classes(
    content: Sequence[str] | Mapping[str, str] | None,
    folders: Sequence[str],
    usual: Mapping[str, str],
    where: str,
) -> ClassNames:
    """Put names to labels.

    Args:
        content: from `read_classes`; None where the data say nothing.
        folders: names of the class folders of all splits, sorted; none for shards.
        usual: what the data set's classes are usually called, by label, for when nothing is said.
        where: named in errors.

    Raises:
        ValueError: a folder has no name, or nothing says what the classes are called.
    """
    if content is None and usual:
        known = ClassNames(tuple(usual.values()), _places(usual))
        if all(folder in known.places for folder in folders):
            return known
        if _are_numbers(folders, len(usual)):
            return _numbered(tuple(usual.values()), folders)
    if content is None:
        if not folders:
            raise ValueError(f"{where}: a classes.json has to say what the classes are called")
        names = check_names([folder.replace("_", " ") for folder in folders], where)
        return ClassNames(names, {folder: place for place, folder in enumerate(folders)})
    if isinstance(content, Mapping):
        ordered = {label: content[label] for label in sorted(content)}
        result = ClassNames(tuple(ordered.values()), _places(ordered))
        unknown = [folder for folder in folders if folder not in result.places]
        if unknown:
            raise ValueError(f"{where}: the folder {unknown[0]} has no name among the classes")
        return result
    names = tuple(content)
    places = {name: place for place, name in enumerate(names)}
    spelled = {
        folder: places.get(folder, places.get(folder.replace("_", " "))) for folder in folders
    }
    if all(place is not None for place in spelled.values()):
        return ClassNames(names, {**places, **{f: p for f, p in spelled.items() if p is not None}})
    if _are_numbers(folders, len(names)):
        return _numbered(names, folders)
    if len(folders) != len(names):
        unknown = next(folder for folder, place in spelled.items() if place is None)
        raise ValueError(
            f"{where}: there are {len(folders)} class folders and {len(names)} names, and the "
            f"folder {unknown} is none of the names: name each folder, as in "
            f'{{"{unknown}": "..."}}'
        )
    ordered = sorted(folders, key=int) if all(map(str.isdecimal, folders)) else folders
    return ClassNames(names, {folder: place for place, folder in enumerate(ordered)})


def _places(names: Mapping[str, str]) -> dict[str, int]:
    """By label and by name; where a text is both, by label."""
    by_name = {name: place for place, name in enumerate(names.values())}
    return {**by_name, **{label: place for place, label in enumerate(names)}}


def _are_numbers(folders: Sequence[str], classes: int) -> bool:
    return all(folder.isdecimal() and int(folder) < classes for folder in folders)


def _numbered(names: tuple[str, ...], folders: Sequence[str]) -> ClassNames:
    return ClassNames(names, {folder: int(folder) for folder in folders})


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
