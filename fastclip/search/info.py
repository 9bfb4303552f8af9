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
        counts = [self.model.embed_dim, self.model.image_size, self.model.context_length]
        for shard in self.shards:
            counts += [shard.size + 1, shard.samples + 1]
        for part in self.parts:
            counts += [part.first + 1, part.samples, part.records + 1]
            if not 0 <= part.shard < len(self.shards):
                raise ValueError(f"{where}: {part.file} is of shard {part.shard}, which is no one")
            if part.first + part.samples > self.shards[part.shard].samples:
                raise ValueError(f"{where}: {part.file} has more samples than its shard")
            if part.records > part.samples:
                raise ValueError(f"{where}: {part.file} has more records than samples")
        if min(counts, default=1) < 1:
            raise ValueError(f"{where}: a count is negative or zero")
        files = [part.file for part in self.parts]
        if self.vectors is not None and self.vectors.kind != "flat":
            files.append(self.vectors.file)
            if self.vectors.probes < 1 or self.vectors.candidates < 1:
                raise ValueError(f"{where}: its vectors are searched with 0 probes or candidates")
        for file in files:
            if not file or Path(file).name != file or file.startswith("."):
                raise ValueError(f"{where}: {file!r} is no name of a file beside it")
        if len(set(files)) != len(files):
            raise ValueError(f"{where}: a file is named twice")


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
        ValueError: it is damaged, or of another version.
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
    description: Description = from_dict(Description, value, str(path))
    description.check(path)
    return description
