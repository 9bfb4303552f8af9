"""Which files a shard list means."""

from __future__ import annotations

import glob
import re
from pathlib import Path

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_shards(pattern: str) -> list[Path]:
    """Tar files meant by `pattern`, in sorted order without repetition.

    Args:
        pattern: a folder (all ``*.tar`` in it), a file, a glob, numbers in braces
            (``{00000..00042}``), or several of these separated by ``::``.

    Raises:
        FileNotFoundError: a part matches nothing, or a file of a numbered range is not there.
        ValueError: it is empty, or names something that is not a local file.
    """
    if not pattern:
        raise ValueError("no shards given: name a folder or pattern, e.g. --data '/data/*.tar'")
    found: list[Path] = []
    for part in pattern.split("::"):
        if not part:  # it would mean the current folder
            raise ValueError(f"{pattern}: one of the parts between :: is empty")
        if "://" in part or part.startswith("pipe:"):
            raise ValueError(f"{part}: only local files can be read; copy the shards here first")
        for name in _expand_braces(part):
            found.extend(_match(name, part))
    return sorted(set(found))


def _match(name: str, part: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        matches = sorted(path.glob("*.tar"))
        what = f"the folder {part} holds no *.tar"
    elif path.is_file():
        return [path]
    else:
        matches = [Path(match) for match in glob.glob(name) if Path(match).is_file()]
        what = f"no file matches {part}" if name == part else f"no file {name} (from {part})"
    if not matches:
        raise FileNotFoundError(what)
    return matches


def _expand_braces(text: str) -> list[str]:
    match = _BRACES.search(text)
    if match is None:
        return [text]
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise ValueError(f"{text}: the range {match[0]} runs backwards")
    width = len(match[1])
    names = (
        f"{text[: match.start()]}{n:0{width}d}{text[match.end() :]}" for n in range(first, last + 1)
    )
    return [expanded for name in names for expanded in _expand_braces(name)]
