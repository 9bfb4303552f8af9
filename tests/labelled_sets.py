"""Small labelled data sets for tests: coloured shapes in class folders, or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shards import COLOURS, SHAPES, picture, write_tar


def write_folders(split: Path, colours: tuple[str, ...] = COLOURS[:3], images: int = 4) -> None:
    """A folder for each colour with so many pictures of it."""
    for colour in colours:
        (split / colour).mkdir(parents=True)
        for number in range(images):
            shape = SHAPES[number % len(SHAPES)]
            content = picture(colour.replace("_", ""), shape, number % 13)
            (split / colour / f"{number}.png").write_bytes(content)


def write_labelled(split: Path, abouts: list[dict[str, Any] | None]) -> None:
    """A shard of pictures with these json members, or without."""
    split.mkdir(parents=True)
    rows = []
    for number, about in enumerate(abouts):
        colour = COLOURS[number % 3]
        members = {"png": picture(colour, SHAPES[number % 4], number % 13)}
        if about is not None:
            members["json"] = json.dumps(about).encode()
        rows.append((f"{number:04d}", members))
    write_tar(split / "0.tar", rows)


def describe(folder: Path, **fields: Any) -> None:
    """A dataset.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(fields))
