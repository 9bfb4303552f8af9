"""The report of a run as one HTML file that needs nothing else: no scripts, no requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """An image in the report."""

    source: str
    """A ``data:`` address, see `picture`."""

    score: float | None = None
    """Cosine similarity."""

    right: bool | None = None
    """Whether it is what was asked for."""

    name: str = ""
    """Its sample's key."""


@dataclass(frozen=True)
class Figure:
    """A titled curve."""

    title: str
    svg: str


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were taken for another."""

    truth: str
    answer: str
    count: int
    of: int
    """Images of the class."""
    example: Picture


@dataclass(frozen=True)
class Matrix:
    """Counts or similarities, coloured by their values."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    digits: int
    """After the point."""
    shades: Sequence[Sequence[float]]
    """How strongly a cell is coloured, 0 to 1."""
    pictures: Sequence[Picture] = ()
    """In place of the columns' names."""


@dataclass(frozen=True)
class ZeroShotPart:
    """One zero-shot task."""

    name: str
    images: int
    classes: int
    top1: float
    top5: float
    confusions: Sequence[Confusion]
    matrix: Matrix | None
    gallery: Sequence[tuple[str, Sequence[Picture]]]
    """Texts, and the images that fit them best."""


@dataclass(frozen=True)
class RetrievalPart:
    """One retrieval task."""

    name: str
    recall: Sequence[tuple[str, Sequence[float]]]
    """By direction, at 1, 5 and 10."""
    images: int
    texts: int
    text_to_image: Sequence[tuple[str, Sequence[Picture]]]
    image_to_text: Sequence[tuple[Picture, Sequence[tuple[str, float, bool]]]]
    similarities: Matrix | None


@dataclass(frozen=True)
class RunPage:
    """Everything in the report, in its order."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    curves: Sequence[Figure]
    speed: Sequence[Figure]
    zero_shot: Sequence[ZeroShotPart]
    retrieval: Sequence[RetrievalPart]
    launches: Sequence[tuple[str, str, str, str, str]]
    """When, from which step, what, on which machine, by which commit."""
    versions: Sequence[tuple[str, str]]
    config: str
    notes: Sequence[str] = field(default_factory=tuple)
    """What is missing, and why."""


def picture(
    pixels: NDArray[np.uint8],
    *,
    size: int = 96,
    score: float | None = None,
    right: bool | None = None,
    name: str = "",
) -> Picture:
    """uint8 pixels [R, R, 3] as a WebP of `size` pixels' side inside the page."""
    image = Image.fromarray(pixels)
    if image.width > size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    image.save(written, "WEBP", quality=82)
    content = base64.b64encode(written.getvalue()).decode("ascii")
    return Picture(f"data:image/webp;base64,{content}", score, right, name)


def render(page: RunPage) -> str:
    """The HTML file's text; every text in it is escaped.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise ImportError(
            "a report is filled in by jinja2: pip install 'fastclip-torch[eval]'"
        ) from None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("fastclip.report").joinpath("page.html").read_text(encoding="utf-8")
    style = files("fastclip.report").joinpath("page.css").read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page, style=style)
