"""The demo's splits, over the pictures of stand-in packages: what is held out is not trained on."""

from __future__ import annotations

import itertools
from collections import Counter

from fastclip.data.demo import HELD_OUT_STYLES, split_pictures
from fastclip.data.demo_debian import LANGUAGES
from fastclip.data.demo_sources import DIGIT_WORDS, EMOJI_STYLES, FLAG_STYLES, FOODS, Picture


def _picture(key: str, label: str, **more: object) -> Picture:
    settings = {"source": "a package", "style": "game-icons", "original": key.encode(), **more}
    return Picture(
        key=key,
        label=label,
        extension="png",
        draw=bytes,
        licence="CC0-1.0",
        **settings,  # type: ignore
    )


def _pictures() -> list[Picture]:
    """What the packages hold, in small: some pictures are equal, some labels rare."""
    pictures = []
    for style, number in itertools.product(EMOJI_STYLES, range(300)):
        if number % 3 == 0 and style != "noto":  # many have one style only
            continue
        # Of every ten emoji, a set draws two alike.
        original = f"{style} {number - (number % 10 == 1)}".encode()
        about = _picture(f"{style}-{number}", f"emoji {number}", style=style, original=original)
        pictures.append(about)
    for style, number in itertools.product(FLAG_STYLES, range(200)):
        pictures.append(_picture(f"{style}-flag-{number}", f"flag: {number}", style=style))
    pictures += [_picture(f"icon-{number}", f"icon {number}") for number in range(200)]
    for number in range(300):
        group = f"group {number % 7}" if number else "a group of one"
        photograph = str(number // 7 % 20 * 7 + number % 7).encode()  # each of two or three foods
        about = _picture(
            f"food-{number}", f"food {number}", source=FOODS, group=group, original=photograph
        )
        pictures.append(about)
    for number, word in itertools.product(range(150), DIGIT_WORDS):
        about = _picture(f"{word}-{number}", word, source="mnist", more={"number": number})
        pictures.append(about)
    translated = {f"caption_{language}": "so" for language in LANGUAGES}
    for number in range(200):
        more = translated if number % 4 else {}
        pictures.append(_picture(f"stamp-{number}", f"stamp {number}", style="stamp", more=more))
    return pictures


def test_what_is_held_out_is_not_trained_on() -> None:
    pictures = _pictures()
    splits = split_pictures(pictures)
    assert Counter(p.key for members in splits.values() for p in members) == Counter(
        p.key for p in pictures
    )
    assert [p.key for p in split_pictures(reversed(pictures))["train"]] == [
        p.key for p in splits["train"]
    ]
    train = splits.pop("train")
    assert splits.keys() == {
        *(f"style-{style}" for style in HELD_OUT_STYLES),
        *("test-captions", "test-digits", "test-foods", "test-seen-flags", "test-seen-styles"),
        "test-tux-paint",
    }
    styles, labels = Counter(p.style for p in train), Counter(p.label for p in train)
    originals = {p.original for p in train}
    for style in HELD_OUT_STYLES:
        assert not styles[style]
        assert {p.style for p in splits[f"style-{style}"]} == {style}
    for split in ("test-captions", "test-tux-paint"):
        assert not {p.label for p in splits[split]} & labels.keys()
    for split, known in (
        ("test-seen-styles", EMOJI_STYLES),
        ("test-seen-flags", FLAG_STYLES),
    ):
        held_out = splits[split]
        trained = sum(styles[style] for style in known)
        assert 0.03 < len(held_out) / (len(held_out) + trained) < 0.06
        assert all(p.style in known and styles[p.style] and labels[p.label] for p in held_out)
        assert not {p.original for p in held_out} & originals
    foods = splits["test-foods"]
    assert not {p.original for p in foods} & originals
    trained_groups = {p.group for p in train}
    assert {p.group for p in foods} <= trained_groups
    assert "a group of one" in trained_groups
    assert 0.15 < len(foods) / 300 < 0.35
    assert Counter(p.label for p in splits["test-digits"]) == dict.fromkeys(DIGIT_WORDS, 50)
    assert 20 <= len(splits["test-tux-paint"]) <= 50
    assert all("caption_ja" in p.more for p in splits["test-tux-paint"])
