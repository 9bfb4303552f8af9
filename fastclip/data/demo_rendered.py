"""Words and sentences drawn as pictures: what a model reads, not what it recognises.

As the paper's Rendered SST2 (arXiv 2103.00020, appendix A.1), in small and in sentences of our own.
The font is the one within Pillow, so that every machine draws the same.
"""

from __future__ import annotations

import functools
import io
import itertools
import random
import textwrap
from collections.abc import Callable, Iterator

from PIL import Image, ImageDraw, ImageFont

from fastclip.data.demo_sources import Picture, stable_hash

WORDS = (
    *("ant", "axe", "bat", "bed", "boy", "bug", "bus", "cat", "cow", "dog", "ear", "egg", "elf"),
    *("eye", "fly", "fog", "fox", "hut", "ice", "jar", "key", "leg", "man", "owl", "pen", "pie"),
    *("pig", "ram", "rat", "sun", "baby", "bank", "bear", "bell", "bird", "bomb", "bone", "coat"),
    *("coin", "crab", "deer", "door", "dove", "drum", "duck", "fire", "fish", "foot"),
    *("frog", "gear", "girl", "goat", "harp", "herb", "hole", "hook", "kiss", "kite", "knot"),
    *("lion", "nose", "pear", "pill", "ring", "rock", "rose", "salt", "seal", "seat", "ship"),
    *("soap", "star", "swan", "taxi", "tent", "wing", "wolf", "wood", "worm", "bread", "chair"),
    *("cloud", "crown", "eagle", "ghost", "horse", "house", "lemon", "mouse", "onion", "peach"),
    *("pizza", "robot", "shark", "snake", "spoon", "tiger", "train", "watch", "whale"),
)
"""Short names of emoji, each a class."""

WORD_PICTURES = {"train": 20, "test": 10}
SENTENCES = {"train": 100, "test": 50}
"""Of each sentiment; no sentence is in both splits."""

_ADJECTIVES = {
    "positive": (
        *("brilliant", "charming", "delightful", "funny", "gripping", "joyful", "lovely"),
        *("moving", "perfect", "tender", "warm", "wonderful"),
    ),
    "negative": (
        *("boring", "clumsy", "dreadful", "dull", "hollow", "lifeless", "messy", "painful"),
        *("shallow", "stale", "tedious", "tiresome"),
    ),
}
_NOUNS = ("book", "film", "meal", "play", "show", "song", "story", "trip")
_STATEMENTS = ("a {} {noun}", "what a {} {noun}", "the {noun} is {}", "we found the {noun} {}")
_DENIAL = "the {noun} is never {}"

SENTIMENTS = tuple(_ADJECTIVES)

_OVERSAMPLING = 4
_MARGIN = 0.95  # of the square's side that a text may fill
_CONTRAST = 0.4  # least difference of luminance between text and ground, of 1


def rendered_pictures() -> dict[str, list[Picture]]:
    """The pictures of every split within ``suite/``, in an order that classes do not decide."""
    words = {
        f"suite/rendered-words/{split}": list(_word_pictures(split)) for split in WORD_PICTURES
    }
    splits = words | _sentiment_pictures()
    return {
        split: sorted(pictures, key=lambda each: stable_hash(each.key))
        for split, pictures in splits.items()
    }


def _word_pictures(split: str) -> Iterator[Picture]:
    for number, word in itertools.product(range(WORD_PICTURES[split]), WORDS):
        key = f"word-{word}-{split}-{number:02d}"
        yield _picture(key, word, functools.partial(draw_word, word, stable_hash(key)))


def _sentiment_pictures() -> dict[str, list[Picture]]:
    splits: dict[str, list[Picture]] = {
        f"suite/rendered-sentiment/{split}": [] for split in SENTENCES
    }
    for sentiment in SENTIMENTS:
        sentences = iter(sorted(_sentences(sentiment), key=stable_hash))
        for split, pictures in zip(SENTENCES, splits.values(), strict=True):
            for number, text in enumerate(itertools.islice(sentences, SENTENCES[split])):
                draw = functools.partial(draw_sentence, text, stable_hash(text))
                key = f"sentiment-{sentiment}-{split}-{number:03d}"
                pictures.append(_picture(key, text, draw, group=sentiment))
    return splits


def _sentences(sentiment: str) -> Iterator[str]:
    """All that can be said; one in five denies the other sentiment's word."""
    (other,) = set(SENTIMENTS) - {sentiment}
    for noun in _NOUNS:
        for statement, adjective in itertools.product(_STATEMENTS, _ADJECTIVES[sentiment]):
            yield statement.format(adjective, noun=noun)
        for adjective in _ADJECTIVES[other]:
            yield _DENIAL.format(adjective, noun=noun)


def _picture(
    key: str, label: str, draw: Callable[[int], bytes], *, group: str | None = None
) -> Picture:
    return Picture(
        key=key,
        label=label,
        source="Pillow",
        style="rendered",
        extension="png",
        draw=draw,
        licence="CC0-1.0",  # of the font, Aileron
        group=group,
    )


def draw_word(word: str, seed: int, size: int) -> bytes:
    """A PNG of `size` × `size` pixels with one word; `seed` decides on all but the word."""
    chance = random.Random(seed)
    return _draw(word, chance.uniform(0.2, 0.38), chance.uniform(-15, 15), chance, size)


def draw_sentence(sentence: str, seed: int, size: int) -> bytes:
    """A PNG of `size` × `size` pixels with a sentence in lines of up to 12 letters."""
    chance = random.Random(seed)
    lines = "\n".join(textwrap.wrap(sentence, width=12))
    return _draw(lines, chance.uniform(0.13, 0.17), chance.uniform(-4, 4), chance, size)


def _draw(text: str, height: float, angle: float, chance: random.Random, size: int) -> bytes:
    """Text of a font `height` sides high, turned by `angle` degrees, placed and coloured by chance.

    What would be larger than the square is made smaller.
    """
    side = size * _OVERSAMPLING
    font = ImageFont.load_default(height * side)
    assert isinstance(font, ImageFont.FreeTypeFont)
    # Pillow's own layout: with another library's, kerning would depend on the machine.
    font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = ruler.multiline_textbbox((0, 0), text, font=font)
    mask = Image.new("L", (round(right - left) + 2, round(bottom - top) + 2))
    ImageDraw.Draw(mask).multiline_text((1 - left, 1 - top), text, font=font, fill=255)
    mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    mask = mask.crop(mask.getbbox())
    longest = round(_MARGIN * side)
    mask.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    place = (
        round(chance.random() * (side - mask.width)),
        round(chance.random() * (side - mask.height)),
    )
    whole = Image.new("L", (side, side))
    whole.paste(mask, place)
    ground, ink = _colours(chance)
    shape = (size, size)
    picture = Image.composite(
        Image.new("RGB", shape, ink),
        Image.new("RGB", shape, ground),
        whole.resize(shape, Image.Resampling.BOX),
    )
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


Colour = tuple[int, int, int]


def _colours(chance: random.Random) -> tuple[Colour, Colour]:
    """Two colours of which one is much lighter than the other."""
    while True:
        pair = _colour(chance), _colour(chance)
        light, other = (
            (0.299 * red + 0.587 * green + 0.114 * blue) / 255 for red, green, blue in pair
        )
        if abs(light - other) >= _CONTRAST:
            return pair


def _colour(chance: random.Random) -> Colour:
    red, green, blue = (int(256 * chance.random()) for _ in range(3))
    return red, green, blue
