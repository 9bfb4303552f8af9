"""Captioned data sets, on which retrieval is measured (arXiv 2103.00020, Table 13)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.data.index import ShardIndex, index_shards
from fastclip.data.reader import is_caption_key
from fastclip.eval.retrieval import RetrievalTask

CAPTION_FIELDS = ("title", "captions", "caption_lines", "templates", "splits", "note")
"""What the description of a captioned data set may say."""

_FORM = 'are "txt", "json:field", or several, {"en": "txt", "de": "json:caption_de"}'

ONLY_CAPTIONS = "captions"
"""What captions are called that the description gives no name."""


@dataclass(frozen=True, kw_only=True)
class CaptionedDataset:
    """A data set that retrieval is measured on."""

    name: str
    """Of its folder."""

    title: str

    source: ShardIndex

    tasks: Mapping[str, RetrievalTask]
    """By the name of the captions: there may be several, say in other languages."""

    note: str


def check_captioned(content: Mapping[str, Any], path: Path) -> None:
    """Whether the description of a captioned data set says what it may say.

    Args:
        content: an object, its titles, notes and splits checked.
        path: named in errors.

    Raises:
        ValueError: it does not.
    """
    for name in content:
        if name not in CAPTION_FIELDS:
            raise ValueError(f"{path}: {name} is of labelled data sets; this one has captions")
    named = _named(content["captions"])
    for name, key in named.items():
        if not name or "/" in name:
            raise ValueError(f"{path}: a name of captions is not empty and has no /: {name!r}")
        if not is_caption_key(key):
            raise ValueError(f"{path}: captions {_FORM}, not {key!r}")
    if not named:
        raise ValueError(f"{path}: captions {_FORM}; there are none")
    if not isinstance(content.get("caption_lines", False), bool):
        raise ValueError(
            f"{path}: caption_lines, whether each line is a caption, is true or false, not "
            f"{content['caption_lines']!r}"
        )
    templates = content.get("templates", ["{}"])
    if templates == "imagenet" or len(templates) != 1:
        raise ValueError(f'{path}: templates of captions are a single one, ["a photo of {{}}"]')
    if set(content.get("splits", {"test": ""})) != {"test"}:
        raise ValueError(f"{path}: of a data set with captions there is one split, test")


def open_captioned(folder: Path, about: Mapping[str, Any], shards: str) -> CaptionedDataset:
    """The data set in `folder` that `about` describes, its test split in `shards`.

    Raises:
        FileNotFoundError, ValueError: see `index_shards`.
    """
    (template,) = about.get("templates", ["{}"])
    return CaptionedDataset(
        name=folder.name,
        title=about.get("title", folder.name),
        source=index_shards(shards, needs=()),
        tasks={
            name: RetrievalTask(
                name=name,
                shards=shards,
                caption_key=key,
                caption_lines=about.get("caption_lines", False),
                template=template,
            )
            for name, key in _named(about["captions"]).items()
        },
        note=about.get("note", ""),
    )


def _named(captions: Any) -> dict[str, Any]:
    """By their names."""
    return captions if isinstance(captions, dict) else {ONLY_CAPTIONS: captions}
