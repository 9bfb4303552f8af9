"""Evaluation batches: every sample once, in order, the centre of each image."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastclip.data.decode import BadSampleError
from fastclip.data.decoders import ImageDecoder, build_decoder
from fastclip.data.index import Sample
from fastclip.data.quarantine import Quarantine
from fastclip.data.reader import Members
from fastclip.data.remote import stop_with
from fastclip.data.transforms import centre_crop

logger = logging.getLogger("fastclip")


class SampleSource(Protocol):
    """Samples by number: those of shards (`ShardIndex`) or of a folder (`FolderIndex`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sample: ...


@dataclass(frozen=True)
class EvalBatch:
    """Samples of one rank that could be read."""

    images: Tensor
    """uint8 [B, 3, R, R], RGB; the model normalises them on its device."""

    keys: tuple[str, ...]
    """Names of the samples."""

    metadata: tuple[dict[str, Any], ...]
    """Their json members; empty where there is none."""

    numbers: tuple[int, ...]
    """Their places in the index."""

    def __len__(self) -> int:
        return self.images.shape[0]


def eval_batches(
    index: SampleSource,
    *,
    image_size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 2,
    apply_orientation: bool = False,
) -> Iterator[EvalBatch]:
    """This rank's share of the samples, once.

    Every rank gives the same number of batches, the last ones perhaps small or empty, so that
    forwards that communicate stay in step. A sample that cannot be used is named, counted and left
    out.

    Args:
        index: from `index_shards` or `index_folder`.
        apply_orientation: as in `DataConfig`.
    """
    bad = Quarantine()
    decoder = build_decoder("auto", apply_orientation=apply_orientation)
    share = world_size * batch_size
    firsts = range(rank * batch_size, -(-len(index) // share) * share, share)
    stop = threading.Event()
    with ThreadPoolExecutor(workers, "fastclip-eval", stop_with, (stop,)) as pool:
        queue: deque[Future[EvalBatch]] = deque()
        try:
            for first in firsts:
                numbers = range(min(first, len(index)), min(first + batch_size, len(index)))
                queue.append(pool.submit(_build, index, numbers, image_size, bad, decoder))
                if len(queue) > workers + 1:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:  # who is interrupted need not wait for shards on other machines
            stop.set()
    if bad.total:
        logger.warning("evaluation left out %d sample(s): %s", bad.total, dict(bad.counts))


def _build(
    index: SampleSource,
    numbers: range,
    image_size: int,
    bad: Quarantine,
    decoder: ImageDecoder,
) -> EvalBatch:
    images = np.empty((len(numbers), image_size, image_size, 3), np.uint8)
    keys, places = [], []
    metadata: list[dict[str, Any]] = []
    for number in numbers:
        sample = index[number]
        try:
            members = Members(sample)
            about = members.metadata()
            image = decoder.open(members.image)
            decoder.decode(image, centre_crop(*image.size), images[len(keys)])
        except BadSampleError as error:
            bad.bad(sample, error)
            continue
        metadata.append(about)
        keys.append(sample.key)
        places.append(number)
    return EvalBatch(
        images=torch.from_numpy(images[: len(keys)]).permute(0, 3, 1, 2),
        keys=tuple(keys),
        metadata=tuple(metadata),
        numbers=tuple(places),
    )
