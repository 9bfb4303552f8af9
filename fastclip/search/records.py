"""One part of an index: features, and the records of the images they are of, in one file.

A part is a safetensors file, written whole or not at all and never changed. Texts lie in one blob
of bytes with the ends of each; all is mapped into memory, and read where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastclip.search.info import Description

_ENTRY = "fastclip_part"
_FIELD = "field."
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Record:
    """An image of an index."""

    number: int
    shard: str
    """Path or address."""

    key: str
    caption: str
    """"" without one."""

    fields: Mapping[str, str]
    """Those that its metadata has."""

    width: int
    height: int
    """In pixels, as the image is seen."""


@dataclass(frozen=True)
class Found:
    """A record with its cosine similarity to a query."""

    score: float
    record: Record


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a part keeps of one sample beside its feature."""

    key: str
    caption: str
    place: tuple[int, int]
    """Offset and size of the encoded image in its shard, in bytes."""

    size: tuple[int, int]
    """Width and height in pixels."""

    hash: int
    """Of the encoded image: see `image_hash`."""

    fields: Mapping[str, str]


def image_hash(content: bytes) -> int:
    """63 bits that tell whether an image is the one that was embedded."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def write_part(
    path: Path,
    features: Tensor,
    rows: Sequence[Row],
    fields: Sequence[str],
    quarantine: Sequence[Mapping[str, Any]],
    dtype: str,
) -> str:
    """Write one part; returns the SHA-256 of the file.

    Args:
        features: fp32 [n, D] of unit length.
        rows: n of them.
        fields: whose values are kept.
        quarantine: samples that could not be used, plain data.
        dtype: "float16" or "float32", of the features as they are kept.
    """
    keys, key_ends = _blob([row.key.encode("utf-8", "surrogateescape") for row in rows])
    captions, caption_ends = _blob([row.caption.encode("utf-8", "replace") for row in rows])
    tensors = {
        "features": features.to(_DTYPES[dtype]).contiguous(),
        "places": torch.tensor([row.place for row in rows], dtype=torch.int64).view(-1, 2),
        "sizes": torch.tensor([row.size for row in rows], dtype=torch.int32).view(-1, 2),
        "hashes": torch.tensor([row.hash for row in rows], dtype=torch.int64),
        "keys": keys,
        "key_ends": key_ends,
        "captions": captions,
        "caption_ends": caption_ends,
    }
    values: dict[str, list[str]] = {}
    for field in fields:
        codes: dict[str, int] = {}
        column = [codes.setdefault(row.fields.get(field, ""), len(codes)) for row in rows]
        tensors[_FIELD + field] = torch.tensor(column, dtype=torch.int32)
        values[field] = list(codes)
    entry = {"values": values, "quarantine": list(quarantine)}
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata={_ENTRY: json.dumps(entry)})
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return digest


def _blob(encoded: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    ends = torch.tensor(np.cumsum([len(text) for text in encoded], dtype=np.int64))
    return torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8), ends


class Part:
    """An open part. For any number of threads.

    Args:
        path: its file.
        count: records it has to have.
        embed_dim: D.
        dtype: of the features.
        fields: it has to have.
        shard_size: bytes of the shard that its images lie in.

    Attributes:
        features: [n, D], mapped.
        places: offset and size of each image in the shard, int64 [n, 2].
        hashes: of the images, int64 [n].
        codes: of each field, the places of the records' values in `values`, int32 [n].
        quarantine: plain data on the samples that could not be used.

    Raises:
        FileNotFoundError, ValueError: it is not there, or not what it has to be.
    """

    def __init__(
        self,
        path: Path,
        *,
        count: int,
        embed_dim: int,
        dtype: str,
        fields: Sequence[str],
        shard_size: int,
    ) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                entry = json.loads((file.metadata() or {})[_ENTRY])
            self.features = _column(tensors, "features", _DTYPES[dtype], (count, embed_dim))
            self.places = _column(tensors, "places", torch.int64, (count, 2)).numpy()
            self.sizes = _column(tensors, "sizes", torch.int32, (count, 2)).numpy()
            self.hashes = _column(tensors, "hashes", torch.int64, (count,)).numpy()
            self._keys = _texts(tensors, "keys", "key_ends", count)
            self._captions = _texts(tensors, "captions", "caption_ends", count)
            self.values: dict[str, list[str]] = {}
            self.codes: dict[str, NDArray[np.int32]] = {}
            for field in fields:
                values = entry["values"][field]
                codes = _column(tensors, _FIELD + field, torch.int32, (count,)).numpy()
                if not all(isinstance(value, str) for value in values):
                    raise ValueError(f"its values of {field} are no texts")
                if count and not 0 <= codes.min() <= codes.max() < len(values):
                    raise ValueError(f"its values of {field} are not there")
                self.values[field], self.codes[field] = values, codes
            self.quarantine: list[dict[str, Any]] = entry["quarantine"]
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is not there: make the index anew with fastclip embed"
            ) from None
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): make the index anew with fastclip embed"
            ) from None
        offsets, sizes = self.places[:, 0], self.places[:, 1]
        if count and (offsets.min() < 0 or sizes.min() < 0 or (sizes > shard_size - offsets).any()):
            raise ValueError(f"{path}: an image lies outside of its shard")

    def key(self, row: int) -> str:
        """Of a sample."""
        return _text(self._keys, row, "surrogateescape")

    def caption(self, row: int) -> str:
        """Of a sample; "" without one."""
        return _text(self._captions, row, "replace")

    def fields(self, row: int) -> dict[str, str]:
        """Of a sample, those that its metadata has."""
        found = {name: self.values[name][codes[row]] for name, codes in self.codes.items()}
        return {name: value for name, value in found.items() if value}


def open_parts(directory: Path, description: Description) -> list[Part]:
    """All parts of an index. Raises FileNotFoundError, ValueError: see `Part`."""
    return [
        Part(
            directory / part.file,
            count=part.records,
            embed_dim=description.model.embed_dim,
            dtype=description.dtype,
            fields=description.fields,
            shard_size=description.shards[part.shard].size,
        )
        for part in description.parts
    ]


def _column(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"its {name} are {tensor.dtype} {list(tensor.shape)}")
    return tensor


def _texts(
    tensors: Mapping[str, Tensor], blob: str, ends: str, count: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = tensors[blob]
    where = _column(tensors, ends, torch.int64, (count,)).numpy()
    if content.dtype != torch.uint8 or content.ndim != 1:
        raise ValueError(f"its {blob} are no texts")
    if count and ((np.diff(where, prepend=0) < 0).any() or where[-1] > len(content)):
        raise ValueError(f"its {blob} overlap")
    return content.numpy(), where


def _text(texts: tuple[NDArray[np.uint8], NDArray[np.int64]], row: int, errors: str) -> str:
    content, ends = texts
    begin = int(ends[row - 1]) if row else 0
    return content[begin : int(ends[row])].tobytes().decode("utf-8", errors)
