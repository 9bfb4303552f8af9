"""Words and sentences drawn as pictures: balanced, apart, repeatable, legible."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from fastclip.data.demo_rendered import WORDS, draw_sentence, draw_word, rendered_pictures


def test_rendered_sets_are_balanced_and_apart() -> None:
    splits = rendered_pictures()
    keys = Counter(p.key for members in splits.values() for p in members)
    assert set(keys.values()) == {1}
    for split, count in (("train", 20), ("test", 10)):
        labels = Counter(p.label for p in splits[f"suite/rendered-words/{split}"])
        assert labels == dict.fromkeys(WORDS, count)
    assert len(set(WORDS)) == 100
    train, test = (splits[f"suite/rendered-sentiment/{split}"] for split in ("train", "test"))
    assert Counter(p.group for p in train) == {"positive": 100, "negative": 100}
    assert Counter(p.group for p in test) == {"positive": 50, "negative": 50}
    assert len({p.label for p in [*train, *test]}) == 300
    # A denial turns a word round: no word decides alone.
    assert any("never dull" in p.label and p.group == "positive" for p in [*train, *test])


@pytest.mark.parametrize(
    ("draw", "text"),
    [(draw_word, "whale"), (draw_sentence, "the story is never delightful")],
)
def test_rendered_text_is_repeatable_whole_and_legible(draw: Callable, text: str) -> None:
    drawn = [draw(text, seed, 48) for seed in range(40)]
    assert drawn == [draw(text, seed, 48) for seed in range(40)]
    assert len(set(drawn)) == 40
    places = set()
    for content in drawn:
        image = Image.open(io.BytesIO(content))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))
        grey = np.asarray(image.convert("L"), dtype=float)
        ground = np.median(grey)
        ink = np.abs(grey - ground) > 50
        assert ink.sum() > 20
        rows, columns = np.where(ink)
        # One letter cannot be all: the text is as wide as it must be, and inside.
        assert columns.max() - columns.min() > 10
        places.add((rows.min(), columns.min()))
    assert len(places) > 20
