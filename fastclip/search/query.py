"""`fastclip search`: what is searched for, and what was found, for people."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.eval.prompts import check_templates, fill
from fastclip.printing import printable
from fastclip.report.contact_sheet import Hit, draw_contact_sheet
from fastclip.search.encoder import MAX_QUERY_BYTES, Encoder
from fastclip.search.index import SearchIndex
from fastclip.search.outputs import check_sheet
from fastclip.search.records import Found

_THUMBNAIL = 88
"""Pixels of a side on a contact sheet."""


@dataclass(frozen=True)
class Query:
    """One thing to search for."""

    name: str
    """The text, or the image's file."""

    image: bytes | None = None
    """Encoded; None for a text."""


def read_query(word: str, kind: Literal["auto", "text", "image"] = "auto") -> Query:
    """A word of the command line: an image if there is such a file, else a text.

    Args:
        kind: what it is, if that is known.

    Raises:
        FileNotFoundError, ValueError: the image is not there, is no file, or is far too large.
    """
    if kind == "text" or (kind == "auto" and not os.path.lexists(word)):
        return Query(word)
    try:
        status = os.stat(word)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {word}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{word} is not a file: name an image, or --text to search for the word")
    if status.st_size > MAX_QUERY_BYTES:
        raise ValueError(
            f"{word} has {status.st_size:,} bytes; at most {MAX_QUERY_BYTES:,} are read"
        )
    return Query(word, Path(word).read_bytes())


def query_features(
    encoder: Encoder, queries: Sequence[Query], templates: Sequence[str] = ("{}",)
) -> Tensor:
    """Features of queries, fp32 [N, D] of unit length.

    Args:
        templates: texts with {} for a text that is searched for; the mean of their features is
            taken, as in zero-shot classification.

    Raises:
        ValueError: a text is empty, an image cannot be used, or a template has no single {}.
    """
    check_templates(templates, "--template")
    found = []
    for query in queries:
        if query.image is None:
            if not query.name.strip():
                raise ValueError("the text to search for is empty")
            texts = encoder.texts(fill(templates, query.name))
            found.append(F.normalize(texts.mean(dim=0), dim=0))
            continue
        try:
            found.append(encoder.image_bytes(query.image))
        except ValueError as error:
            raise ValueError(f"{query.name}: {error}") from None
    return torch.stack(found)


def open_encoder(index: SearchIndex, model: Path | None = None, *, device: str = "cpu") -> Encoder:
    """The model that made an index, found by what the index says, or in `model`.

    Raises:
        FileNotFoundError, ValueError: it is not there (any more), or it is another one.
    """
    try:
        encoder = Encoder(Path(index.info.model_path) if model is None else model, device=device)
    except FileNotFoundError as error:
        if model is not None:
            raise
        raise FileNotFoundError(
            f"the model of {index.directory} is not where it was: name the run or checkpoint with "
            f"--model ({error})"
        ) from None
    index.check(encoder)
    return encoder


def parse_filters(words: Sequence[str]) -> dict[str, str]:
    """``field=value`` each. Raises ValueError: one is not written so, or a field occurs twice."""
    filters: dict[str, str] = {}
    for word in words:
        field, equals, value = word.partition("=")
        if not equals or not field or not value:
            raise ValueError(f"a filter is written field=value, not {word!r}")
        if field in filters:
            raise ValueError(f"the field {field} is filtered by twice; no record has two values")
        filters[field] = value
    return filters


def as_json(query: Query, found: Sequence[Found]) -> dict[str, Any]:
    """What was found as plain data."""
    return {
        "query": query.name,
        "kind": "text" if query.image is None else "image",
        "found": [
            {
                "score": hit.score,
                "number": hit.record.number,
                "shard": hit.record.shard,
                "key": hit.record.key,
                "caption": hit.record.caption,
                "fields": dict(hit.record.fields),
                "width": hit.record.width,
                "height": hit.record.height,
            }
            for hit in found
        ],
    }


def format_found(query: Query, found: Sequence[Found], filters: Mapping[str, str]) -> str:
    """What was found as a table as wide as the terminal."""
    where = ", ".join(f"{field}={value}" for field, value in filters.items())
    lines = [f"{printable(query.name)}" + (f" ({printable(where)})" if where else "")]
    width = shutil.get_terminal_size((120, 24)).columns
    rows = [
        (
            f"{hit.score:.4f}",
            printable(hit.record.caption),
            printable(hit.record.key),
            printable("/".join(hit.record.shard.split("/")[-2:])),
        )
        for hit in found
    ]
    rest = max(20, width - 4 - 8 - 4 - max((len(row[3]) for row in rows), default=0))
    key = min(rest // 2, max((len(row[2]) for row in rows), default=0))
    for rank, (score, caption, name, shard) in enumerate(rows, 1):
        lines.append(
            f"{rank:4d}  {score}  {_cut(name, key):{key}}  {shard}  {_cut(caption, rest - key)}"
        )
    return "\n".join(lines if rows else [*lines, "  nothing"])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def draw_found(
    index: SearchIndex,
    encoder: Encoder,
    rows: Sequence[tuple[Query, Sequence[Found]]],
    path: Path,
) -> None:
    """Write a contact sheet of what was found, a row for each query.

    Raises:
        ValueError, OSError: an image cannot be read any more, or the sheet not be written.
    """
    check_sheet(path)
    drawn = []
    for query, found in rows:
        hits = [
            Hit(
                encoder.thumbnail(index.image(hit.record.number), _THUMBNAIL),
                hit.score,
                right=False,
            )
            for hit in found
        ]
        drawn.append((printable(query.name), hits))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_contact_sheet(f"{index.directory.name}, {encoder.name}", drawn, path)
