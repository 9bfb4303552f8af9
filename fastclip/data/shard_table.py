"""The samples of one shard as a table: made by walking it, or read from the index beside it.

The index of ``00000.tar`` is ``00000.fcidx``: a safetensors file whose metadata say which tar it
belongs to and how many samples there are, so that ten thousand shards are known in a second; the
columns are read when the first sample is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fastclip.data.tar import BLOCK, key_of, members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_EXTENSION = "txt"
METADATA_EXTENSION = "json"
INDEX_SUFFIX = ".fcidx"
DALI_SUFFIX = ".idx"
"""Of the index that DALI's own reader takes."""
_ROLES = ("image", CAPTION_EXTENSION, METADATA_EXTENSION)
_VERSION = 1
_ENTRY = "fastclip_index"
_LONGEST_HEADER = 64 << 20
_PARTIAL = ".partial"
_ABANDONED_SECONDS = 3600


@dataclass(frozen=True)
class Problem:
    """Something in a shard that cannot be used."""

    shard: str
    key: str
    kind: str
    reason: str

    def __str__(self) -> str:
        key = self.key if self.key.isprintable() else repr(self.key)  # a key may hold line ends
        where = f"{self.shard}: {key}" if key else self.shard
        return f"{where}: {self.kind}: {self.reason}"


@dataclass(frozen=True)
class Summary:
    """What is known of a shard without its table."""

    tar_bytes: int
    modified_ns: int
    samples: int
    """Those with an image."""

    usable: dict[str, int]
    """Of these, those with a caption ("txt"), metadata ("json"), both ("json+txt"), or any ("")."""

    digest: str
    """Of the table's keys and places."""

    problems: tuple[Problem, ...]
    """Of the tar itself; what a sample lacks is seen when it is known what it needs."""

    lost_bytes: int
    cut_key: str
    """The sample in which a truncated shard ends; "" for none."""

    def count(self, needs: tuple[str, ...]) -> int:
        """Samples that have an image and what `needs` names."""
        return self.usable["+".join(sorted(needs))]


@dataclass
class ShardTable:
    """A shard's samples that have an image, in the tar's order."""

    keys: list[str]
    places: NDArray[np.int64]
    """[samples, 6] offset and size in bytes of image, caption and metadata; -1 and 0 where there is
    none."""

    extensions: NDArray[np.uint8]
    """[samples] number of the image's extension in `IMAGE_EXTENSIONS`."""

    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What looking at the images has shown, [samples] each; see `fastclip.data.indexing`."""

    def usable(self, needs: tuple[str, ...]) -> NDArray[np.int64]:
        """Numbers of the samples that have what `needs` names beside the image."""
        there = np.ones(len(self.keys), dtype=bool)
        for need in needs:
            there &= self.places[:, 2 * _ROLES.index(need)] >= 0
        return np.flatnonzero(there)

    def lacking(self, shard: str, needs: tuple[str, ...], cut_key: str = "") -> list[Problem]:
        """The samples that lack something, but for the one in which the shard ends."""
        problems = []
        for number in np.flatnonzero(~np.isin(np.arange(len(self.keys)), self.usable(needs))):
            key = self.keys[number]
            if key == cut_key:
                continue
            need = next(n for n in needs if self.places[number, 2 * _ROLES.index(n)] < 0)
            what = "caption" if need == CAPTION_EXTENSION else "metadata"
            problems.append(Problem(shard, key, f"missing {what}", f"no {key}.{need}"))
        return problems


def scan_shard(path: Path) -> tuple[Summary, ShardTable]:
    """Walk a tar's headers.

    Raises:
        OSError: it cannot be read.
    """
    problems: list[Problem] = []
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    images: dict[str, int] = {}
    lost = 0

    def report(key: str, kind: str, reason: str, lost_bytes: int = 0) -> None:
        nonlocal lost
        lost += lost_bytes
        problems.append(Problem(path.name, key, kind, reason))

    status = path.stat()
    for name, place in members(path, report):
        base = name.rpartition("/")[2]
        stem, _, extension = base.partition(".")
        if not stem:
            continue  # hidden files, such as the ones that macOS adds
        key = key_of(name)
        found = samples.setdefault(key, {})
        role = _role(extension.lower())
        if role in found:
            report(key, "duplicate member", f"{name} occurs again; the first is used")
            continue
        found[role] = place
        if role == "image":
            images[key] = IMAGE_EXTENSIONS.index(extension.lower())
    # A truncated shard's last sample is part of that problem, not another one.
    truncated = any(problem.kind == "truncated shard" for problem in problems)
    cut_key = next(reversed(samples), "") if truncated else ""
    keys, places, extensions = [], [], []
    for key, found in samples.items():
        if "image" in found:
            keys.append(key)
            extensions.append(images[key])
            places.append([n for role in _ROLES for n in found.get(role, (-1, 0))])
        elif key != cut_key:
            has = ", ".join(f".{role}" for role in found)
            others = any(role not in _ROLES for role in found)
            kind = "unsupported image" if others else "missing image"
            report(key, kind, f"none of {', '.join(IMAGE_EXTENSIONS)}; it has {has}")
    table = ShardTable(
        keys,
        np.array(places, dtype=np.int64).reshape(-1, 6),
        np.array(extensions, dtype=np.uint8),
    )
    return summarise(table, status, tuple(problems), lost, cut_key), table


def _role(extension: str) -> str:
    return "image" if extension in IMAGE_EXTENSIONS else extension


def summarise(
    table: ShardTable,
    status: os.stat_result,
    problems: tuple[Problem, ...],
    lost_bytes: int,
    cut_key: str,
) -> Summary:
    """A table's summary; `status` is the tar's."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\0".join(table.keys).encode("utf-8", "surrogateescape"))
    digest.update(table.places.tobytes())
    kinds = ((), ("txt",), ("json",), ("json", "txt"))
    return Summary(
        tar_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        samples=len(table.keys),
        usable={"+".join(needs): len(table.usable(needs)) for needs in kinds},
        digest=digest.hexdigest(),
        problems=problems,
        lost_bytes=lost_bytes,
        cut_key=cut_key,
    )


def index_path(shard: Path) -> Path:
    """Where a shard's index lies."""
    return beside(shard, INDEX_SUFFIX)


def beside(shard: Path, suffix: str) -> Path:
    """``00000.tar`` with another suffix; of a file of another kind, its name with one more."""
    if shard.suffix in (".tar", suffix):
        return shard.with_suffix(suffix)
    return shard.with_name(shard.name + suffix)


def save_table(shard: Path, summary: Summary, table: ShardTable) -> Path:
    """Write the index of `shard` beside it, whole or not at all."""
    encoded = [key.encode("utf-8", "surrogateescape") for key in table.keys]
    arrays: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "key_ends": np.cumsum([len(key) for key in encoded], dtype=np.int64),
        "places": table.places,
        "extensions": table.extensions,
        **table.columns,
    }
    entry = {"version": _VERSION, "shard": shard.name, **asdict(summary)}
    target = index_path(shard)
    partial = partial_path(target)
    try:
        save_file(arrays, partial, metadata={_ENTRY: json.dumps(entry)})
        partial.chmod(stat.S_IMODE(shard.stat().st_mode))  # who may read a shard may read its index
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def partial_path(target: Path) -> Path:
    """Where this process writes `target`, which takes a moment, before it is whole."""
    return target.with_name(f".{target.name}.{os.getpid()}{_PARTIAL}")


def remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed have left of `partial_path`: an hour old or more."""
    for suffix in (INDEX_SUFFIX, DALI_SUFFIX):
        for left in folder.glob(f".*{suffix}.*{_PARTIAL}"):
            with contextlib.suppress(OSError):  # another process has removed it
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    left.unlink()


def load_summary(shard: Path) -> Summary | None:
    """What the index beside `shard` says of it; None if there is none of this version.

    Raises:
        ValueError: the file is no index.
    """
    path = index_path(shard)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
            ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
            if 8 + length + max(ends) != os.fstat(file.fileno()).st_size:
                raise ValueError("it is cut off")
        entry = json.loads(header["__metadata__"][_ENTRY])
        if entry.pop("version") != _VERSION:
            return None
        if index_path(Path(entry.pop("shard"))).name != path.name:
            return None  # it was renamed, and may be another's
        summary = Summary(problems=tuple(Problem(**p) for p in entry.pop("problems")), **entry)
        _check_summary(summary)
        return summary
    except FileNotFoundError:
        return None
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no index of fastclip ({error}): remove it, or make it anew with fastclip "
            "data index"
        ) from None


def _check_summary(summary: Summary) -> None:
    numbers = [summary.tar_bytes, summary.modified_ns, summary.samples, summary.lost_bytes]
    usable = [summary.usable[kind] for kind in ("", "txt", "json", "json+txt")]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*numbers, *usable)):
        raise ValueError("its counts are no numbers")
    if max(usable) > summary.samples:
        raise ValueError("its counts contradict each other")
    texts = (summary.digest, summary.cut_key, *(t for p in summary.problems for t in astuple(p)))
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its texts are none")


def load_table(shard: Path) -> ShardTable:
    """The table in the index beside `shard`.

    Raises:
        ValueError: the file is damaged.
    """
    path = index_path(shard)
    try:
        arrays: Mapping[str, NDArray[Any]] = load_file(path)
        columns = dict(arrays)
        blob = columns.pop("keys").tobytes()
        key_ends, places = columns.pop("key_ends"), columns.pop("places")
        extensions = columns.pop("extensions")
        _check_columns(len(blob), key_ends, places, extensions)
        if any(column.shape != key_ends.shape for column in columns.values()):
            raise ValueError("its columns are of different lengths")
        ends = key_ends.tolist()
        keys = [
            blob[begin:end].decode("utf-8", "surrogateescape")
            for begin, end in zip([0, *ends], ends, strict=False)
        ]
    except (KeyError, SafetensorError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): make it anew with fastclip data index"
        ) from None
    return ShardTable(keys, places, extensions, columns)


def _check_columns(
    blob: int, ends: NDArray[Any], places: NDArray[Any], extensions: NDArray[Any]
) -> None:
    rows = ends.shape[:1]
    shapes = (rows, (*rows, 6), rows)
    kinds = (np.int64, np.int64, np.uint8)
    for column, shape, kind in zip((ends, places, extensions), shapes, kinds, strict=True):
        if column.dtype != kind or column.shape != shape:
            raise ValueError("its columns are of other kinds or lengths")
    steps = np.diff(ends, prepend=0)
    if (steps < 0).any() or (ends.size and ends[-1] != blob):
        raise ValueError("its keys overlap")
    offsets, sizes = places[:, ::2], places[:, 1::2]
    if not ((offsets == -1) | (offsets >= BLOCK)).all() or (sizes < 0).any():
        raise ValueError("its places lie outside of a tar")
    if (extensions >= len(IMAGE_EXTENSIONS)).any():
        raise ValueError("its extensions are unknown")
