"""Perceptual hashes of all images of some shards, computed once and kept shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fastclip.data.index import ShardIndex
from fastclip.data.perceptual_hash import HASH_VERSION, Hashes, hash_samples
from fastclip.data.pixels import PixelReader
from fastclip.data.remote_files import RemoteFile
from fastclip.data.rewriting import write_whole

_HASHES_AT_A_TIME = 1 << 20


class HashCache:
    """A folder with a file for each shard, named after what its hashes depend on.

    What was killed goes on there, and whoever asks for the same shards again begins with them.

    Args:
        folder: is made where it is missing.
        reader: decodes the images.
        progress: is told of each shard that has been hashed.
    """

    def __init__(self, folder: Path, reader: PixelReader, progress: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._reader = reader
        self._progress = progress

    def blocks(self, index: ShardIndex) -> Iterator[tuple[NDArray[np.int64], Hashes]]:
        """Numbers and hashes of the images that can be decoded, about a million at a time.

        Raises:
            ValueError: a file of the cache is damaged.
            OSError: a shard or the folder cannot be used.
        """
        numbers: list[NDArray[np.int64]] = []
        hashes: list[Hashes] = []
        for shard in range(len(index.shards)):
            own, usable = self._shard(index, shard)
            numbers.append(index.numbers(shard).start + np.flatnonzero(usable))
            hashes.append(own[usable])
            last = shard == len(index.shards) - 1
            if last or sum(map(len, numbers)) >= _HASHES_AT_A_TIME:
                yield np.concatenate(numbers), np.concatenate(hashes)
                numbers, hashes = [], []

    def all(self, index: ShardIndex) -> tuple[NDArray[np.int64], Hashes]:
        """`blocks` as one."""
        numbers, hashes = zip(*self.blocks(index), strict=True)
        return np.concatenate(numbers), np.concatenate(hashes)

    def _shard(self, index: ShardIndex, shard: int) -> tuple[Hashes, NDArray[np.bool_]]:
        """Hashes of a shard's samples and which of them have one; kept whole or not at all."""
        path = self.folder / f"{_digest(index, shard, self._reader)}.safetensors"
        count = len(index.numbers(shard))
        if path.is_file():
            try:
                arrays = load_file(path)
                hashes, usable = arrays["hashes"], arrays["usable"].astype(np.bool_)
                if hashes.shape != (count, 2) or usable.shape != (count,):
                    raise ValueError("it has another number of images")
            except (SafetensorError, KeyError, ValueError) as error:
                raise ValueError(f"{path} cannot be read ({error}): delete it") from None
            return hashes, usable
        hashes, usable = hash_samples(self._reader, index, index.numbers(shard))
        content = save({"hashes": hashes, "usable": usable.astype(np.uint8)})
        write_whole(path, lambda file: file.write(content))
        self._progress(
            f"hashed {index.shards[shard]} ({shard + 1} of {len(index.shards)}), {count:,} images"
        )
        return hashes, usable


def _digest(index: ShardIndex, shard: int, reader: PixelReader) -> str:
    """Changes with what a shard's hashes depend on: its file, its samples and the decoder."""
    file = index.shards[shard]
    if isinstance(file, RemoteFile):
        state = f"{file.identity}\n{file.size}\n{file.version}"
    else:
        status = file.stat()
        state = f"{file.name}\n{status.st_size}\n{status.st_mtime_ns}"
    known = f"{HASH_VERSION}\n{reader.settings}\n{state}"
    digest = hashlib.blake2b(known.encode("utf-8", "surrogateescape"), digest_size=16)
    for number in index.numbers(shard):
        sample = index[number]
        digest.update(f"{sample.key!r} {sample.image}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
