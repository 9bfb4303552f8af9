"""Which files a shard list means."""

from __future__ import annotations

import glob
import math
import re
from pathlib import Path

from fastclip.data.remote import shown
from fastclip.data.remote_files import RemoteFile, Shard, find_remote
from fastclip.data.shard_table import DALI_SUFFIX, INDEX_SUFFIX

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_NAMES = 1_000_000


def expand_shards(pattern: str) -> list[Shard]:
    """Tar files meant by `pattern`, in sorted order without repetition, local ones first.

    Args:
        pattern: a folder (all ``*.tar`` in it), a file, a glob, numbers in braces
            (``{00000..00042}``), or several of these separated by ``::``. Each may be an address
            that fsspec knows (``s3://bucket/folder``); http has files alone, by name or number.

    Raises:
        FileNotFoundError: a part matches nothing, or a file of a numbered range is not there.
        ImportError, ValueError: it is empty, or cannot be asked for; see `find_remote`.
        OSError: another machine does not answer as it should.
    """
    if not pattern:
        raise ValueError("no shards given: name a folder or pattern, e.g. --data '/data/*.tar'")
    found: list[Shard] = []
    for part in pattern.split("::"):
        if not part:  # it would mean the current folder
            raise ValueError(f"{shown(pattern)}: one of the parts between :: is empty")
        if part.startswith("pipe:"):
            raise ValueError(
                f"{part.split()[0]} …: commands from settings are not run; give the address itself "
                "(s3://, gs://, https:// or another that fsspec knows)"
            )
        if _count_names(part) > _MOST_NAMES:
            raise ValueError(f"{shown(part)}: its numbers mean more than {_MOST_NAMES:,} shards")
        part = part.removeprefix("file://")
        if "://" in part:
            found += find_remote(_expand_braces(part))
            continue
        for name in _expand_braces(part):
            found += _match(name, part)
    # Of two kinds, which cannot be compared with each other.
    return sorted(set(found), key=lambda shard: (isinstance(shard, RemoteFile), shard))


def local_shards(pattern: str) -> list[Path]:
    """As `expand_shards`, for what reads or writes beside the shards.

    Raises:
        ValueError: some are on other machines.
    """
    local: list[Path] = []
    for shard in expand_shards(pattern):
        if isinstance(shard, RemoteFile):
            raise ValueError(
                f"{shard}: this works on local files alone: run it where the shards lie, or copy "
                "them here first"
            )
        local.append(shard)
    return local


def _match(name: str, part: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        matches = sorted(match for match in path.glob("*.tar") if match.is_file())
        what = f"the folder {part} holds no *.tar"
    elif path.is_file():
        return [path]
    else:
        matches = [Path(match) for match in glob.glob(name) if _is_shard(Path(match))]
        what = f"no file matches {part}" if name == part else f"no file {name} (from {part})"
    if not matches:
        raise FileNotFoundError(what)
    return matches


def _is_shard(path: Path) -> bool:
    """Whether a glob means it: not the indices that lie beside shards."""
    return path.suffix not in (INDEX_SUFFIX, DALI_SUFFIX) and path.is_file()


def _count_names(text: str) -> int:
    """How many names the numbers in braces make; a range that runs backwards is told later."""
    return math.prod(max(1, int(b) - int(a) + 1) for a, b in _BRACES.findall(text))


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
