"""An index that is open: images by their features, records by their numbers."""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastclip.config import unknown_field
from fastclip.data.decode import BadSampleError
from fastclip.data.remote_files import Shard
from fastclip.data.shard_cache import size_of
from fastclip.data.shards import expand_shards
from fastclip.data.storage import FILES
from fastclip.search.encoder import Encoder
from fastclip.search.exact import search_exact
from fastclip.search.info import (
    INDEX_FILE,
    UNFINISHED_FILE,
    Description,
    IndexInfo,
    ShardInfo,
    load_description,
)
from fastclip.search.probes import gather, probes_for, rerank
from fastclip.search.records import Found, Part, Record, image_hash, open_parts
from fastclip.search.vectors import Lists, load_lists

MOST_RESULTS = 1000
"""Of one search."""

_VALUES_SHOWN = 500
_UNIT = 2e-2
"""How far a query's length may be from 1."""


class SearchIndex:
    """An index as `fastclip embed` wrote it. For any number of threads.

    Attributes:
        directory: where it lies.
        description: the content of its ``index.json``.
        info: what is to be known of it.
    """

    def __init__(
        self,
        directory: Path,
        description: Description,
        parts: Sequence[Part],
        lists: Lists | None,
        shards_root: Path | None,
    ) -> None:
        """Use `open`."""
        self.directory = directory
        self.description = description
        self._parts = parts
        self._features = [part.features for part in parts]
        self._ends = list(accumulate(len(part.places) for part in parts))
        self._lists = lists
        self._root = shards_root
        self._shards: dict[int, Shard] = {}
        self._lock = threading.Lock()
        model, vectors = description.model, description.vectors
        assert vectors is not None
        self.info = IndexInfo(
            count=description.count,
            embed_dim=model.embed_dim,
            image_size=model.image_size,
            context_length=model.context_length,
            model_digest=model.digest,
            model_path=model.path,
            fields={field: self._values_shown(field) for field in description.fields},
            shards=len(description.shards),
            quarantined=description.quarantined,
            vectors=vectors,
            size=sum(path.stat().st_size for path in _files(directory, description)),
        )

    @classmethod
    def open(cls, directory: Path, *, shards_root: Path | None = None) -> SearchIndex:
        """Open the index in a folder, after comparing every byte with the hashes in it.

        Args:
            shards_root: where the shards lie now, if they were moved: it stands for the folder that
                all of them were in.

        Raises:
            FileNotFoundError: there is no index, or not yet, or a file of it is missing.
            ValueError: it is damaged, or of another version.
            ImportError: it needs faiss, which is not installed.
        """
        path = directory / INDEX_FILE
        if not path.is_file():
            if (directory / UNFINISHED_FILE).is_file():
                raise FileNotFoundError(
                    f"{directory} is not finished: run its fastclip embed again, which goes on "
                    "where it stopped"
                )
            raise FileNotFoundError(
                f"{directory} holds no index ({INDEX_FILE}): see fastclip embed"
            )
        description = load_description(path)
        if description.vectors is None:
            raise ValueError(f"{path} names no vectors: make the index anew with fastclip embed")
        _check_files(directory, description)
        parts = open_parts(directory, description)
        lists = None
        if description.vectors.kind == "ivf":
            lists = load_lists(
                directory / description.vectors.file,
                count=description.count,
                embed_dim=description.model.embed_dim,
            )
        return cls(directory, description, parts, lists, shards_root)

    def check(self, encoder: Encoder) -> None:
        """Raises ValueError unless `encoder` is the model that made the features."""
        model = self.description.model
        if encoder.embed_dim != model.embed_dim:
            raise ValueError(
                f"{self.directory} has features of {model.embed_dim} numbers and {encoder.path} "
                f"makes {encoder.embed_dim}: name the model that it was made with ({model.path})"
            )
        if encoder.digest != model.digest:
            raise ValueError(
                f"{self.directory} was made with the model {model.digest[:12]} ({model.path}), and "
                f"{encoder.path} is {encoder.digest[:12]}: name that model, or embed anew"
            )

    def search(
        self,
        features: Tensor,
        k: int,
        *,
        exact: bool = False,
        filters: Mapping[str, str] | None = None,
    ) -> list[list[Found]]:
        """The k nearest records of each query, best first; fewer if there are fewer.

        Scores are cosine similarities, computed from the stored features whatever found them.
        (Features of half precision have a length of 1 to within 0.0005.)

        Args:
            features: fp32 [M, D] of unit length.
            k: from 1 to `MOST_RESULTS`.
            exact: compare with every record, also where there are lists.
            filters: values that fields have to have. A filtered search is exact.

        Raises:
            ValueError: an argument does not fit; there is no such field, or no such value.
        """
        numbers, scores = self.nearest(features, k, exact=exact, filters=filters)
        return [
            [Found(min(s, 1.0), self.record(n)) for s, n in zip(*pair, strict=True)]
            for pair in zip(scores, numbers, strict=True)
        ]

    def nearest(
        self,
        features: Tensor,
        k: int,
        *,
        exact: bool = False,
        filters: Mapping[str, str] | None = None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """As `search`: each query's numbers of records, and their scores."""
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_RESULTS:
            raise ValueError(f"the number of results is from 1 to {MOST_RESULTS}, not {k}")
        if features.ndim != 2 or features.shape[1] != self.info.embed_dim:
            raise ValueError(
                f"queries are [number, {self.info.embed_dim}], not {list(features.shape)}"
            )
        queries = features.detach().to("cpu", torch.float32)
        if not ((queries.norm(dim=1) - 1).abs() < _UNIT).all():  # NaN is not less
            raise ValueError("queries are of unit length; one is not")
        chosen = self._chosen(filters) if filters else None
        if self._lists is None or exact or chosen is not None:
            scores, numbers = search_exact(self._features, queries, k, chosen)
            return numbers.tolist(), scores.tolist()
        probes = probes_for(k, self.info.vectors.probes)
        wanted = min(k * self.info.vectors.candidates, self.info.count)
        found = self._lists.candidates(queries, wanted, probes)
        all_numbers, all_scores = [], []
        for query, row in zip(queries, found, strict=True):
            scores, numbers = rerank(self._features, query, row, k)
            if len(numbers) < min(k, self.info.count):  # the lists had too few
                scores, numbers = (t[0] for t in search_exact(self._features, query[None], k))
            all_numbers.append(numbers.tolist())
            all_scores.append(scores.tolist())
        return all_numbers, all_scores

    def record(self, number: int) -> Record:
        """Of that number, from 0 on. Raises ValueError: there is none."""
        part, row = self._find(number)
        width, height = part.sizes[row].tolist()
        return Record(
            number=number,
            shard=self._shard_info(number).address,
            key=part.key(row),
            caption=part.caption(row),
            fields=part.fields(row),
            width=width,
            height=height,
        )

    def features(self, numbers: Sequence[int]) -> Tensor:
        """Stored ones, fp32 [n, D] of unit length. Raises ValueError: there is no such record."""
        for number in numbers:
            self._find(number)
        return gather(self._features, np.array(numbers, dtype=np.int64))

    def image(self, number: int) -> bytes:
        """The encoded image of a record, from its shard.

        Raises:
            ValueError: there is no such record, or its shard has something else there now.
            FileNotFoundError, OSError: the shard is not there any more, or cannot be read.
        """
        part, row = self._find(number)
        offset, size = part.places[row].tolist()
        shard = self._shard(number)
        try:
            content, _, _ = FILES.read(shard, ((offset, size), (-1, 0), (-1, 0)))
        except BadSampleError as error:
            raise OSError(f"{part.key(row)}: {error}") from None
        if image_hash(content) != int(part.hashes[row]):
            raise ValueError(
                f"{shard}: {part.key(row)} is not the image that was embedded: embed the shards "
                "anew, or name where they lie now (--shards-root)"
            )
        return content

    def _find(self, number: int) -> tuple[Part, int]:
        if isinstance(number, bool) or not 0 <= number < self.info.count:
            raise ValueError(f"records are numbered from 0 to {self.info.count - 1}, not {number}")
        place = bisect_right(self._ends, number)
        part = self._parts[place]
        return part, number - self._ends[place] + len(part.places)

    def _shard_info(self, number: int) -> ShardInfo:
        place = bisect_right(self._ends, number)
        return self.description.shards[self.description.parts[place].shard]

    def _shard(self, number: int) -> Shard:
        """Where the shard of a record is now; found once."""
        place = self.description.parts[bisect_right(self._ends, number)].shard
        with self._lock:
            known = self._shards.get(place)
        if known is not None:
            return known
        info = self.description.shards[place]
        address = info.address
        if self._root is not None:
            address = str(self._root / Path(address).relative_to(self._common))
        try:
            (shard,) = expand_shards(address) if "://" in address else [Path(address)]
            size = size_of(shard)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the shard {address} is not there any more: name the folder where the shards lie "
                "now (--shards-root)"
            ) from None
        if size != info.size:
            raise ValueError(
                f"the shard {address} has {size:,} bytes, and {info.size:,} when it was embedded: "
                "embed it anew"
            )
        with self._lock:
            return self._shards.setdefault(place, shard)

    @cached_property
    def _common(self) -> str:
        """The folder that all shards were in."""
        folders = {os.path.dirname(shard.address) for shard in self.description.shards}
        try:
            return os.path.commonpath(folders)
        except ValueError:
            raise ValueError(
                f"{self.directory} has shards here and at addresses, which --shards-root cannot "
                f"stand for together: {', '.join(sorted(folders)[:2])}"
            ) from None

    def _chosen(self, filters: Mapping[str, str]) -> list[Tensor]:
        """Of each part, the rows whose fields have these values."""
        for field, value in filters.items():
            if field not in self.description.fields:
                raise ValueError(unknown_field(f"filter {field}", field, self.description.fields))
            if not any(value in part.values[field] for part in self._parts):
                known = sorted({v for part in self._parts for v in part.values[field] if v})
                raise ValueError(unknown_field(f"{field}={value}", value, known[:_VALUES_SHOWN]))
        chosen = []
        for part in self._parts:
            there = np.ones(len(part.places), dtype=bool)
            for field, value in filters.items():
                values = part.values[field]
                code = values.index(value) if value in values else -1
                there &= part.codes[field] == code
            chosen.append(torch.from_numpy(np.flatnonzero(there)))
        return chosen

    def _values_shown(self, field: str) -> tuple[str, ...]:
        counts: Counter[str] = Counter()
        for part in self._parts:
            numbers = np.bincount(part.codes[field], minlength=len(part.values[field]))
            counts.update(dict(zip(part.values[field], numbers.tolist(), strict=True)))
        counts.pop("", None)
        return tuple(sorted(value for value, _ in counts.most_common(_VALUES_SHOWN)))


def _files(directory: Path, description: Description) -> list[Path]:
    names = [part.file for part in description.parts]
    if description.vectors is not None and description.vectors.file:
        names.append(description.vectors.file)
    return [directory / name for name in names]


def _check_files(directory: Path, description: Description) -> None:
    """Compare every file with its hash, in a few threads."""
    files = _files(directory, description)
    hashes = [part.sha256 for part in description.parts]
    if description.vectors is not None and description.vectors.file:
        hashes.append(description.vectors.sha256)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for path, found, expected in zip(files, pool.map(file_hash, files), hashes, strict=True):
            if found != expected:
                raise ValueError(
                    f"{path} is damaged (its SHA-256 is not the one in {INDEX_FILE}): make the "
                    "index anew with fastclip embed"
                )


def file_hash(path: Path) -> str:
    """SHA-256 of a file. Raises FileNotFoundError: it is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is not there: make the index anew with fastclip embed"
        ) from None
