"""What ``index.json`` says of an index: its model, shards, parts and vectors, each checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastclip.config import from_dict, to_dict

FORMAT = 1
INDEX_FILE = "index.json"
UNFINISHED_FILE = "unfinished.json"
"""What is known while shards are being embedded; it becomes the index when all is done."""

_MOST = 2**63 - 1
"""Of a number that is compared with int64 arrays."""

FeatureDtype = Literal["float16", "float32"]
VectorsKind = Literal["flat", "ivf"]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model that made the features."""

    digest: str
    """Of its configuration and weights."""

    path: str
    """Where its checkpoint was."""

    embed_dim: int
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    context_length: int
    apply_orientation: bool


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard whose images are searched."""

    address: str
    """Absolute path, or an address that fsspec knows, without passwords and queries."""

    size: int
    """In bytes."""

    digest: str
    """Of its samples' keys and places."""

    samples: int
    """Those with an image."""


@dataclass(frozen=True, kw_only=True)
class PartInfo:
    """One file of features and records, of consecutive samples of one shard."""

    file: str
    shard: int
    first: int
    """Place of the first sample among the shard's."""

    samples: int
    records: int
    """Samples that could be embedded; the others are in the quarantine."""

    sha256: str
    """Of the file."""


@dataclass(frozen=True, kw_only=True)
class VectorsInfo:
    """How features are searched."""

    kind: VectorsKind
    """flat: all of them, exactly; ivf: those of the nearest lists (`fastclip.search.vectors`)."""

    file: str = ""
    sha256: str = ""
    probes: int = 0
    """Lists that are looked through for one query."""

    candidates: int = 0
    """Of them, so many are compared exactly for each result that is wanted."""

    recall_images: float | None = None
    """Share of the 10 nearest that is found, in the mean over images as queries; as measured."""

    recall_texts: float | None = None
    """Over captions as queries; None without captions."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of ``index.json``."""

    format: int
    model: ModelInfo
    dtype: FeatureDtype
    caption_key: str
    fields: tuple[str, ...]
    """Of the samples' metadata, kept for filters."""

    patterns: tuple[str, ...]
    """That named the shards."""

    shards: tuple[ShardInfo, ...]
    parts: tuple[PartInfo, ...]
    vectors: VectorsInfo | None
    """None while shards are being embedded."""

    @property
    def count(self) -> int:
        """Records in all parts."""
        return sum(part.records for part in self.parts)

    @property
    def quarantined(self) -> int:
        """Samples that could not be embedded."""
        return sum(part.samples - part.records for part in self.parts)

    def check(self, where: Path) -> None:
        """Raises ValueError where its numbers and names contradict each other."""
        for name in ("embed_dim", "image_size", "context_length"):
            _check_count(f"{where}: model.{name}", getattr(self.model, name), least=1)
        for place, shard in enumerate(self.shards):
            _check_count(f"{where}: shards[{place}].size", shard.size)
            _check_count(f"{where}: shards[{place}].samples", shard.samples)
        for place, part in enumerate(self.parts):
            _check_count(f"{where}: parts[{place}].first", part.first)
            _check_count(f"{where}: parts[{place}].samples", part.samples, least=1)
            _check_count(f"{where}: parts[{place}].records", part.records)
            if not 0 <= part.shard < len(self.shards):
                raise ValueError(f"{where}: {part.file} is of shard {part.shard}, which is no one")
            if part.first + part.samples > self.shards[part.shard].samples:
                raise ValueError(f"{where}: {part.file} has more samples than its shard")
            if part.records > part.samples:
                raise ValueError(f"{where}: {part.file} has more records than samples")
        files = [part.file for part in self.parts]
        if self.vectors is not None:
            if not self.count:  # of an index that is finished
                raise ValueError(f"{where}: parts are none, or have no records")
            _check_vectors(where, self.vectors)
            if self.vectors.kind != "flat" or self.vectors.file:
                files.append(self.vectors.file)
        for file in files:
            if not file or Path(file).name != file or file.startswith("."):
                raise ValueError(f"{where}: {file!r} is no name of a file beside it")
        if len(set(files)) != len(files):
            raise ValueError(f"{where}: a file is named twice")


def _check_vectors(where: Path, vectors: VectorsInfo) -> None:
    for name in ("probes", "candidates"):
        least = 0 if vectors.kind == "flat" else 1
        _check_count(f"{where}: vectors.{name}", getattr(vectors, name), least=least)
    for name in ("recall_images", "recall_texts"):
        recall = getattr(vectors, name)
        if recall is not None and not 0 <= recall <= 1:  # NaN neither
            raise ValueError(f"{where}: vectors.{name} is from 0 to 1, not {recall}")


def _check_count(name: str, value: int, *, least: int = 0) -> None:
    if not least <= value <= _MOST:
        raise ValueError(f"{name} is a whole number from {least} to 2**63 - 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What is to be known of an open index."""

    count: int
    """Records, numbered from 0."""

    embed_dim: int
    image_size: int
    context_length: int
    model_digest: str
    model_path: str
    fields: Mapping[str, tuple[str, ...]]
    """Of each field that can be filtered by, its values in order; of more than 500, the most
    frequent ones."""

    shards: int
    quarantined: int
    """Samples that could not be embedded."""

    vectors: VectorsInfo
    size: int
    """Of the index's files, in bytes."""


def save_description(path: Path, description: Description) -> None:
    """Write it, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(to_dict(description), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_description(path: Path) -> Description:
    """Read what `save_description` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another version; the message names the field.
    """
    try:
        value: Any = json.loads(path.read_bytes())
        version = value["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no description of an index: {error!r}") from None
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version!r}, and this version reads {FORMAT}: make the index anew "
            "with fastclip embed"
        )
    try:
        description: Description = from_dict(Description, value, str(path))
    except OverflowError:
        raise ValueError(f"{path}: a recall is from 0 to 1, not a number of 300 digits") from None
    description.check(path)
    return description
