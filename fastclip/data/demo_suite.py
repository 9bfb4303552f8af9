"""The demo's evaluation sets: the names of their classes, and how each is to be evaluated.

Every set is a folder of ``suite/`` with a dataset.json, the format in which
``fastclip eval --datasets`` takes any data set: paths are relative to that file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastclip.data.demo_debian import LANGUAGES
from fastclip.data.demo_rendered import SENTIMENTS, WORDS
from fastclip.data.demo_sources import DIGIT_WORDS, FOODS, Emoji, Picture, country_names


@dataclass(frozen=True, kw_only=True)
class SuiteSet:
    """One labelled set: what a probe is fitted on, and what is classified."""

    name: str
    title: str
    classes: str
    """Name of the classes file."""

    test: str
    """Where its test split is, from the folder of the set."""

    note: str
    train: str = "../../train"
    """Samples of other kinds in there have no label among the classes."""


SUITE = (
    SuiteSet(
        name="digits",
        title="Handwritten digits",
        classes="digits",
        test="../../test-digits",
        note="MNIST; the demo trains on a hundred others of each",
    ),
    SuiteSet(
        name="flags",
        title="Flags of countries",
        classes="flags",
        test="../../style-flagpack",
        note="in a drawing style of which nothing is trained on",
    ),
    SuiteSet(
        name="emoji-labels",
        title="Emoji",
        classes="emoji",
        test="../../style-fluent-emoji-flat",
        note="in a drawing style of which nothing is trained on; by CLDR's name",
    ),
    SuiteSet(
        name="emoji-subgroups",
        title="Emoji, subgroups",
        classes="emoji-subgroups",
        test="../../style-fluent-emoji-flat",
        note="in a drawing style of which nothing is trained on; by Unicode's subgroup",
    ),
    SuiteSet(
        name="emoji-groups",
        title="Emoji, groups",
        classes="emoji-groups",
        test="../../style-fluent-emoji-flat",
        note="in a drawing style of which nothing is trained on; by Unicode's group",
    ),
    SuiteSet(
        name="food-groups",
        title="Foods, groups",
        classes="food-groups",
        test="../../test-foods",
        note="photographs, some of them of several foods; small groups are not tested",
    ),
    SuiteSet(
        name="rendered-words",
        title="Rendered words",
        classes="rendered-words",
        train="train",
        test="test",
        note="words drawn as pictures: the demo trains on none",
    ),
    SuiteSet(
        name="rendered-sentiment",
        title="Rendered sentiment",
        classes="rendered-sentiment",
        train="train",
        test="test",
        note="short judgements drawn as pictures, some with a denial: the demo trains on none",
    ),
)


CAPTIONED: dict[str, dict[str, Any]] = {
    "unseen-captions": {
        "title": "Captions that are not trained on",
        "captions": "txt",
        "splits": {"test": "../../test-captions"},
        "note": "of drawings in styles that are trained on",
    },
}
"""The content of each captioned set's dataset.json."""

TUX_PAINT: dict[str, Any] = {
    "title": "Tux Paint's stamps",
    "captions": {"en": "txt", **{name: f"json:caption_{name}" for name in LANGUAGES}},
    "splits": {"test": "../../test-tux-paint"},
    "note": "photographs and drawings, named in twenty languages; training is in English",
}
"""As above, of the set that only the full demo has."""


def datasets(*, full: bool) -> dict[str, dict[str, Any]]:
    """The content of each set's dataset.json, by the set's name."""
    captioned = {**CAPTIONED, "tux-paint": TUX_PAINT} if full else CAPTIONED
    return {each.name: _labelled(each) for each in SUITE} | captioned


def _labelled(suite_set: SuiteSet) -> dict[str, Any]:
    return {
        "title": suite_set.title,
        "metric": "accuracy",
        # Training has seen bare names and nothing else: a sentence around one would be new to it.
        "templates": ["{}"],
        "classes": f"../../classes/{suite_set.classes}.json",
        "splits": {"train": suite_set.train, "test": suite_set.test},
        "unlabelled": "skip",  # what to do with samples whose label is none of the classes
        "note": suite_set.note,
    }


def classes(emoji: list[Emoji], pictures: Iterable[Picture]) -> dict[str, dict[str, Any]]:
    """The content of each classes file, by its name.

    Args:
        pictures: all that there are; foods say themselves which groups they have.
    """
    foods = {each.group for each in pictures if each.source == FOODS and each.group is not None}
    named = {
        "emoji": ("label", [each.label for each in emoji]),
        "flags": ("label", sorted(country_names(emoji).values())),
        "digits": ("label", [f"handwritten digit {word}" for word in DIGIT_WORDS]),
        "emoji-groups": ("group", sorted({each.group for each in emoji})),
        "emoji-subgroups": ("subgroup", sorted({each.subgroup for each in emoji})),
        "food-groups": ("group", sorted(foods)),
        "rendered-words": ("label", list(WORDS)),
        "rendered-sentiment": ("group", list(SENTIMENTS)),
    }
    return {
        name: {"label_field": field, "classes": names} for name, (field, names) in named.items()
    }
