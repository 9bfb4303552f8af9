"""The 27 data sets of the CLIP paper (arXiv 2103.00020, Table 9), and its results on them.

Counts are those of Table 9, except where its count contradicts the data set itself; the note then
says so. Names of classes come with the data, except where everybody calls them the same. Templates
are this package's own, except for ImageNet's 80, so that zero-shot numbers differ from the paper's
by the prompts as well.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from fastclip.eval.measures import METRICS, Metric
from fastclip.eval.prompts import imagenet_templates
from fastclip.eval.retrieval import DIRECTIONS, RECALL_AT
from fastclip.eval.table import columns


@dataclass(frozen=True, kw_only=True)
class PaperDataset:
    """One of the paper's data sets."""

    name: str
    """Of its folder."""

    title: str
    classes: int

    train: int
    """Images that the paper trains a linear classifier on, validation images included."""

    test: int
    """Images."""

    metric: Metric
    templates: tuple[str, ...]

    names: dict[str, str]
    """What prompts call a class, by its label in the data, in order; {} where the data say it."""

    note: str
    """What to know for laying it out."""


@dataclass(frozen=True, kw_only=True)
class PaperResult:
    """The paper's numbers of one model on one data set, as fractions."""

    zero_shot: float
    """Table 11."""

    linear_probe: float
    """Table 10."""


def _read(name: str) -> Any:
    return json.loads(files("fastclip.eval").joinpath(name).read_text(encoding="utf-8"))


@cache
def paper_datasets() -> dict[str, PaperDataset]:
    """The paper's data sets by name, in the order of its tables."""
    found = {}
    for entry in _read("paper_datasets.json"):
        templates = entry["templates"]
        found[entry["folder"]] = PaperDataset(
            name=entry["folder"],
            title=entry["title"],
            classes=entry["classes"],
            train=entry["train"],
            test=entry["test"],
            metric=METRICS[entry["metric"]],
            templates=imagenet_templates() if templates == "imagenet" else tuple(templates),
            names=entry.get("names", {}),
            note=entry["note"],
        )
    return found


@cache
def paper_results() -> dict[str, dict[str, PaperResult]]:
    """The paper's results by preset, then by data set."""
    content = _read("paper_results.json")
    return {
        preset: {
            name: PaperResult(zero_shot=zero_shot / 100, linear_probe=linear_probe / 100)
            for name, zero_shot, linear_probe in zip(
                content["datasets"], row, content["linear_probe"][preset], strict=True
            )
        }
        for preset, row in content["zero_shot"].items()
    }


CAPTIONED = ("flickr30k", "mscoco")
"""The captioned data sets that the paper has results on (Table 13)."""

CAPTION_TEMPLATE = "a photo of {}"
"""What the paper asks with there."""

CAPTIONS_PER_IMAGE = 5
"""There, but for some images of COCO that have six or seven."""


@cache
def paper_retrieval() -> dict[str, dict[str, dict[str, float]]]:
    """The paper's recalls by preset, then by data set (Table 13), named as `retrieval` has them."""
    return {
        preset: {
            name: {
                "images": float(recalls["images"]),
                "texts": float(recalls["images"] * CAPTIONS_PER_IMAGE),
                **{
                    f"{way}_r{k}": value / 100
                    for way in DIRECTIONS
                    for k, value in zip(RECALL_AT, recalls[way], strict=True)
                },
            }
            for name, recalls in found.items()
        }
        for preset, found in _read("paper_results.json")["retrieval"].items()
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """Text " (did you mean …?)" for a name that is not among those known, or nothing."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


LAYOUT = """\
ROOT/NAME/test/, and for probes ROOT/NAME/train/ and perhaps ROOT/NAME/val/, each of them either
  CLASS/*.jpg, *.png, ...  one folder for each class; or
  *.tar                    WebDataset shards with a json member for each image.
ROOT/NAME/classes.json says what prompts call the classes:
  ["name", ...]                                    in the order of the sorted folders, or of numbers
  {"folder": "name", ...}                          of folders
  {"label_field": "label", "classes": ["name", ...]}  of shards, whose json has the name or its
                                                   number, or a list of them, under the label field
ROOT/NAME/dataset.json, where there is one, describes any data set of your own:
  {"title": "...", "metric": "accuracy", "templates": ["a photo of a {}."],
   "classes": "classes.json", "label_field": "label", "splits": {"train": "train", "test": "test"},
   "unlabelled": "refuse", "paper": "food101", "note": "..."}
or a captioned one, for retrieval, whose test/ holds shards:
  {"title": "...", "captions": {"en": "txt", "de": "json:caption_de"}, "note": "..."}
where each text of a json member's list is a caption; of a text with several, one on each line,
"caption_lines": true says so. "captions": "txt" is enough where there is one kind. Sets named
flickr30k and mscoco are set beside the paper's; its texts have "templates": ["a photo of {}"].
"""


def format_datasets() -> str:
    """The registry as a table, and how data sets are laid out."""
    rows = [["name", "classes", "train", "test", "prompts", "measure"]]
    rows += [
        [
            d.name,
            f"{d.classes:,}",
            f"{d.train:,}",
            f"{d.test:,}",
            f"{len(d.templates)}",
            d.metric.title,
        ]
        for d in paper_datasets().values()
    ]
    notes = [f"{d.name}: {d.note}" for d in paper_datasets().values() if d.note]
    measures = ", ".join(METRICS)
    return "\n\n".join(
        [
            columns(rows),
            "\n".join(notes),
            f"{LAYOUT}Measures: {measures}. Templates may be imagenet.",
        ]
    )
