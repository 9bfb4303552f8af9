"""What balancing does to one shard: count its queries, then write the pairs that are kept.

A shard that is through leaves a file, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.data.decode import BadSampleError
from fastclip.data.index import Sample
from fastclip.data.phrases import Phrases
from fastclip.data.reader import Members
from fastclip.data.rewriting import is_unsafe, stopping, write_whole
from fastclip.data.shard_writer import write_shard
from fastclip.data.storage import FILES
from fastclip.data.tar import members

TOTALS = ("pairs", "unusable", "unmatched", "matches")
"""What is counted of a shard beside its queries."""

_CHUNK = 1024


@dataclass(frozen=True)
class Job:
    """What balancing was asked for, and where its files lie; see `balance`."""

    queries: list[str]
    per_query: int
    seed: int
    caption_key: str
    out: Path

    @property
    def work(self) -> Path:
        return self.out / ".balance"

    @property
    def counts(self) -> Path:
        """int64 [queries]: pairs of all shards in which each occurs."""
        return self.work / "counts.npy"

    def counted(self, number: int) -> Path:
        """Shard `number`'s `TOTALS`, and its queries' ids and counts."""
        return self.work / f"{number:06d}.counted.npz"

    def kept(self, number: int) -> Path:
        """What was written of it."""
        return self.work / f"{number:06d}.kept.json"

    def is_kept(self, number: int, name: str) -> bool:
        """Whether shard `number` is written, and lies in the output folder as `name`."""
        if not self.kept(number).is_file():
            return False
        done = json.loads(self.kept(number).read_bytes())
        shard = self.out / name
        return not done["kept"] or (shard.is_file() and shard.stat().st_size == done["bytes"])


def pair_identity(image: bytes, captions: Sequence[str]) -> bytes:
    """Eight bytes that only equal pairs share: BLAKE2b of the image's, then the captions' in UTF-8.

    Several captions are joined by line ends. The key has no part in it: it may depend on the shard.
    """
    digest = hashlib.blake2b(image, digest_size=8)
    digest.update("\n".join(captions).encode("utf-8", "surrogatepass"))
    return digest.digest()


def draw(seed: int, query: str, identity: bytes) -> int:
    """A number from 0 to 2**64 - 1, as good as random, that depends on these three alone."""
    digest = hashlib.blake2b(
        identity, digest_size=8, salt=seed.to_bytes(16, "little"), person=b"fastclip-balance"
    )
    digest.update(query.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little")


class Curator:
    """Does the work of a `Job`, a shard at a time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.phrases = Phrases(job.queries)

    def count(self, number: int, samples: list[Sample]) -> list[str]:
        """Count shard `number`, and leave its file; returns what was left out of it, and why."""
        unusable: list[str] = []
        found = [ids for _, _, ids in self._matches(samples, unusable)]
        ids, counts = np.unique(np.concatenate([*found, np.empty(0, np.int32)]), return_counts=True)
        totals = _totals(found, unusable)
        write_whole(
            self.job.counted(number),
            lambda file: np.savez(file, totals=totals, ids=ids, counts=counts),
        )
        return unusable

    def keep(self, number: int, samples: list[Sample], name: str) -> None:
        """Write what is kept of shard `number` as `name`, if anything is, and leave its file.

        Raises:
            ValueError: it is not what was counted.
        """
        shard, partial = self.job.out / name, self.job.out / f"{name}.partial"
        kept: dict[str, Any] = {"kept": 0, "bytes": 0, "sha256": ""}
        found: list[NDArray[np.int32]] = []
        unusable: list[str] = []

        def chosen() -> Iterator[tuple[str, dict[str, bytes]]]:
            extensions: dict[int, str] = {}
            for sample, captions, ids in self._matches(samples, unusable):
                found.append(ids)
                if not len(ids):
                    continue
                places = (sample.image, sample.caption, sample.metadata)
                with stopping():
                    contents = FILES.read(sample.shard, places)
                if self.is_chosen(ids, contents[0], captions):
                    assert isinstance(sample.shard, Path)  # `balance` takes no others
                    extensions = extensions or _extensions(sample.shard)
                    kept["kept"] += 1
                    parts = sorted(zip(places, contents, strict=True))  # as they lie in the shard
                    yield (
                        sample.key,
                        {extensions[at]: part for (at, _), part in parts if at >= 0},
                    )

        try:
            kept["sha256"] = write_shard(partial, chosen())
            with np.load(self.job.counted(number)) as counted:
                same = np.array_equal(counted["totals"], _totals(found, unusable))
            if not same:
                raise ValueError(
                    f"the shard of {name} changed after it was counted: delete {self.job.out} and "
                    "begin anew"
                )
            if kept["kept"]:
                kept["bytes"] = partial.stat().st_size
                os.replace(partial, shard)
        finally:
            partial.unlink(missing_ok=True)
        write_whole(self.job.kept(number), lambda file: file.write(json.dumps(kept).encode()))

    def is_chosen(self, ids: NDArray[np.int32], image: bytes, captions: Sequence[str]) -> bool:
        """Whether one of the queries `ids`, at least one, keeps the pair."""
        job, counts = self.job, self._counts[ids].tolist()
        if min(counts) <= job.per_query:
            return True
        identity = pair_identity(image, captions)
        # draw / 2**64 < per_query / count, without a rounding.
        return any(
            draw(job.seed, job.queries[query], identity) * count < job.per_query << 64
            for query, count in zip(ids.tolist(), counts, strict=True)
        )

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        return np.load(self.job.counts)

    def _matches(
        self, samples: list[Sample], unusable: list[str]
    ) -> Iterator[tuple[Sample, list[str], NDArray[np.int32]]]:
        """Each sample, its captions and its queries; those that cannot be used go to `unusable`."""
        for begin in range(0, len(samples), _CHUNK):
            usable = []
            for sample in samples[begin : begin + _CHUNK]:
                try:
                    usable.append((sample, self._captions(sample)))
                except BadSampleError as error:
                    unusable.append(f"{sample.shard.name}: {sample.key}: {error}")
            offsets, ids = self.phrases.match([text for _, texts in usable for text in texts])
            first = 0
            for sample, texts in usable:
                last = first + len(texts)
                found = ids[offsets[first] : offsets[last]]
                yield sample, texts, found if len(texts) == 1 else np.unique(found)
                first = last

    def _captions(self, sample: Sample) -> list[str]:
        if is_unsafe(sample.key):
            raise BadSampleError("unsafe name", "it leads out of the folder it is unpacked in")
        # Only the caption is read.
        is_text = self.job.caption_key == "txt"
        absent = (-1, 0)
        needed = replace(sample, image=absent, **{"metadata" if is_text else "caption": absent})
        with stopping():
            content = Members(needed)
        return content.captions(self.job.caption_key)


def _totals(found: list[NDArray[np.int32]], unusable: list[str]) -> NDArray[np.int64]:
    sizes = [len(ids) for ids in found]
    return np.array([len(found), len(unusable), sizes.count(0), sum(sizes)], np.int64)


def _extensions(shard: Path) -> dict[int, str]:
    """How the extension of the member at each offset is spelled."""

    def ignore(key: str, kind: str, reason: str, lost_bytes: int = 0) -> None:
        """The index has said it."""

    return {
        offset: name.rpartition("/")[2].partition(".")[2]
        for name, (offset, _) in members(shard, ignore)
    }
