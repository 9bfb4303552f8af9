"""Evaluation batches: every sample once, in order, the centre of each image."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from fastclip.data.batch import Batch
from fastclip.data.decode import BadSampleError
from fastclip.data.decoders import ImageDecoder, build_decoder
from fastclip.data.index import Sample
from fastclip.data.quarantine import Quarantine
from fastclip.data.reader import Members
from fastclip.data.remote import stop_with
from fastclip.data.transforms import centre_crop
from fastclip.tokenizer import Tokenizer

logger = logging.getLogger("fastclip")


class SampleSource(Protocol):
    """Samples by number: those of shards (`ShardIndex`) or of a folder (`FolderIndex`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sample: ...


def eval_batches(
    index: SampleSource,
    *,
    image_size: int,
    tokenizer: Tokenizer,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 2,
    caption_key: str | None = "txt",
    apply_orientation: bool = False,
) -> Iterator[Batch]:
    """This rank's share of the samples, once.

    Every rank gives the same number of batches, the last ones perhaps small or empty, so that
    forwards that communicate stay in step. A sample that cannot be used is named, counted and left
    out.

    Args:
        index: from `index_shards` or `index_folder`.
        caption_key: as in `DataConfig`; None for images without captions (tokens are then empty
            texts).
        apply_orientation: as in `DataConfig`.
    """
    bad = Quarantine()
    decoder = build_decoder("auto", apply_orientation=apply_orientation)
    share = world_size * batch_size
    firsts = range(rank * batch_size, -(-len(index) // share) * share, share)
    stop = threading.Event()
    with ThreadPoolExecutor(workers, "fastclip-eval", stop_with, (stop,)) as pool:
        queue: deque[Future[Batch]] = deque()
        try:
            for first in firsts:
                numbers = range(min(first, len(index)), min(first + batch_size, len(index)))
                queue.append(
                    pool.submit(
                        _build, index, numbers, image_size, tokenizer, caption_key, bad, decoder
                    )
                )
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
    tokenizer: Tokenizer,
    caption_key: str | None,
    bad: Quarantine,
    decoder: ImageDecoder,
) -> Batch:
    images = np.empty((len(numbers), image_size, image_size, 3), np.uint8)
    captions, keys, places = [], [], []
    metadata: list[dict[str, Any]] = []
    for number in numbers:
        sample = index[number]
        try:
            members = Members(sample)
            caption = "" if caption_key is None else members.captions(caption_key)[0]
            about = members.metadata()
            image = decoder.open(members.image)
            decoder.decode(image, centre_crop(*image.size), images[len(keys)])
        except BadSampleError as error:
            bad.bad(sample, error)
            continue
        captions.append(caption)
        metadata.append(about)
        keys.append(sample.key)
        places.append(number)
    width = tokenizer.context_length
    tokens = torch.zeros((0, width), dtype=torch.int32)
    lengths = torch.zeros((0,), dtype=torch.int32)
    if captions:
        tokens, lengths = tokenizer.encode_batch(captions)
    return Batch(
        images=torch.from_numpy(images[: len(keys)]).permute(0, 3, 1, 2),
        tokens=tokens,
        lengths=lengths,
        ids=None,
        keys=tuple(keys),
        captions=tuple(captions),
        metadata=tuple(metadata),
        numbers=tuple(places),
    )
