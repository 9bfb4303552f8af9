"""Training batches: read, cropped, tokenised by threads ahead of the step, in an exact order.

The stream of samples is endless: epoch after epoch of the plan, so that a batch may begin in one
epoch and end in the next and nothing is dropped. Rank r of W takes its share of each global batch.
What a batch holds depends on (seed, position) alone, never on threads or timing.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastclip.data.batch import Batch
from fastclip.data.decode import MAX_PIXELS, BadSampleError, decode, open_image
from fastclip.data.index import CAPTION_EXTENSION, METADATA_EXTENSION, index_shards
from fastclip.data.plan import Plan, mix
from fastclip.data.reader import BadSamples, Members, caption_id, sentences
from fastclip.data.transforms import random_crop
from fastclip.tokenizer import Tokenizer
from fastclip.tokenizer.packing import PackedTokens

_MOST_REPLACEMENTS = 100
_FEWEST_SEEN = 200  # before that, a fraction of bad samples says little


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and how a pair is drawn from a sample."""

    train: str
    """Shards: a folder, a glob, ``{00000..00042}.tar``, several joined by ``::``."""

    workers: int = 2
    """Threads that prepare batches on each rank."""

    prefetch_batches: int = 4
    """Batches prepared ahead."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Range of a crop's area over the largest square's; (1, 1) is the paper's random crop."""

    caption_key: str = "txt"
    """Where the caption is: the txt member, or ``json:field`` (a text or a list of texts)."""

    sample_caption: bool = False
    """Of several captions in a list take a random one each time, not the first."""

    sample_sentence: bool = False
    """Take one random sentence of the caption (ConVIRT's augmentation, dropped by CLIP)."""

    positives: Literal["none", "caption", "label"] = "none"
    """Further positives of a pair: none, pairs with the same caption, or the same json label_id."""

    tokenizer: Literal["native", "python"] = "native"
    """The compiled tokenizer, or the Python one: the same ids, about 100 times slower."""

    text: Literal["packed", "trimmed", "padded"] = "packed"
    """Captions without padding, padded to the batch's longest one, or to the context length. All
    give the same features and gradients; packed computes least."""

    pack_to_multiple: int = 1
    """Fill up the tokens of packed captions to a multiple of this; run.cuda_graphs wants few
    numbers of them."""

    apply_orientation: bool = False
    """Turn images as their EXIF data says; open_clip and most others do not."""

    max_pixels: int = MAX_PIXELS
    """Larger images count as bad samples."""

    max_bad_fraction: float = 0.1
    """Stop with an error when more than this share of the samples seen cannot be used."""

    def __post_init__(self) -> None:
        for name in ("workers", "prefetch_batches", "max_pixels", "pack_to_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is at least 1, not {getattr(self, name)}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale is a range in (0, 1], not {self.crop_scale}")
        if self.caption_key != "txt" and not self.caption_key.removeprefix("json:"):
            raise ValueError("data.caption_key=json: lacks the field's name: json:caption")
        if self.caption_key != "txt" and not self.caption_key.startswith("json:"):
            raise ValueError(f"data.caption_key is txt or json:field, not {self.caption_key!r}")
        if self.text not in ("packed", "trimmed", "padded"):
            raise ValueError(f"data.text is packed, trimmed or padded, not {self.text!r}")
        if self.text != "packed" and self.pack_to_multiple > 1:
            raise ValueError(
                f"data.pack_to_multiple={self.pack_to_multiple} is for data.text=packed, not "
                f"{self.text}"
            )
        if self.positives not in ("none", "caption", "label"):
            raise ValueError(f"data.positives is none, caption or label, not {self.positives!r}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is in [0, 1], not {self.max_bad_fraction}")


@dataclass(frozen=True)
class _Pair:
    key: str
    pixels: NDArray[np.uint8]
    caption: str
    identity: int
    metadata: dict[str, Any]


class TrainLoader:
    """Endless iterator over this rank's batches.

    Args:
        image_size: side of the squares given, in pixels.
        batch_size: pairs per batch of this rank.
        micro_batches: equal parts that the step computes a batch in; packed texts come in these.
        rank, world_size: which share of each global batch of ``world_size * batch_size`` pairs.
        seed: of order, crops and every other choice.

    Attributes:
        wait_seconds: time the consumer has spent waiting for batches.

    Raises:
        FileNotFoundError, ValueError: see `index_shards`; or the usable samples do not fill one
            global batch.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        tokenizer: Tokenizer,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        micro_batches: int = 1,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or batch_size % micro_batches:
            raise ValueError(
                f"batch_size={batch_size} in {micro_batches} parts, rank={rank} of {world_size} "
                "make no batch"
            )
        self.config = config
        self.image_size = image_size
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.wait_seconds = 0.0
        needs = {CAPTION_EXTENSION if config.caption_key == "txt" else METADATA_EXTENSION}
        if config.positives == "label":
            needs.add(METADATA_EXTENSION)
        self.index = index_shards(config.train, needs=tuple(sorted(needs)))
        if rank == 0:
            self.index.log_problems()
        if self.global_batch_size > len(self.index):
            raise ValueError(
                f"a global batch of {self.global_batch_size} pairs is more than the "
                f"{len(self.index)} usable ones in {config.train}, so that pairs would be their "
                "own negatives: set a smaller batch or give more shards"
            )
        self._plan = Plan(self.index.sizes, seed)
        self._bad = BadSamples()
        self._position = 0
        self._scheduled = 0
        self._queue: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="fastclip-loader")
        self._closed = False

    @property
    def global_batch_size(self) -> int:
        """Pairs of all ranks in a step."""
        return self.world_size * self.batch_size

    @property
    def samples_per_epoch(self) -> int:
        """Usable samples."""
        return len(self.index)

    @property
    def epoch(self) -> float:
        """Passes over the data that the consumer has taken."""
        return self._position / len(self.index)

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("the loader is closed")
        while len(self._queue) < self.config.prefetch_batches:
            first = self._scheduled + self.rank * self.batch_size
            # The plan's caches belong to this thread.
            places = [self._plan(first + place) for place in range(self.batch_size)]
            self._queue.append(self._pool.submit(self._build, places))
            self._scheduled += self.global_batch_size
        begin = time.perf_counter()
        try:
            batch = self._queue.popleft().result()
        except BaseException:
            self.close()
            raise
        self.wait_seconds += time.perf_counter() - begin
        self._position += self.global_batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer stands; plain data, a few dozen bytes, the same on every rank."""
        return {"seed": self.seed, "position": self._position, "index": self.index.hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, with any number of ranks, threads and batch size.

        Raises:
            ValueError: the state belongs to another seed or to other shards.
        """
        if state["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint's data order has seed {state['seed']}, this run has "
                f"{self.seed}: set run.seed={state['seed']}"
            )
        if state["index"] != self.index.hash:
            raise ValueError(
                "the shards are not those of the checkpoint (other files, samples or sizes): "
                "restore them, or start a new run from the weights with run.init_from"
            )
        for future in self._queue:
            future.cancel()
        self._queue.clear()
        self._position = self._scheduled = int(state["position"])

    def report(self) -> dict[str, int]:
        """Counts of what could not be used: in the shards' structure, and on decoding."""
        counts: dict[str, int] = {}
        for problem in self.index.problems:
            counts[problem.kind] = counts.get(problem.kind, 0) + 1
        for kind, count in self._bad.counts.items():
            counts[kind] = counts.get(kind, 0) + count
        return counts

    def close(self) -> None:
        """Stop the threads; batches under way are thrown away."""
        self._closed = True
        self._queue.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _build(self, places: list[tuple[int, int]]) -> Batch:
        images = np.empty((len(places), self.image_size, self.image_size, 3), dtype=np.uint8)
        pairs = []
        for row, (epoch, number) in enumerate(places):
            pair = self._usable(epoch, number)
            images[row] = pair.pixels
            pairs.append(pair)
        captions = [pair.caption for pair in pairs]
        tokens, lengths = self.tokenizer.encode_batch(captions)
        if self.config.text == "trimmed":
            longest = int(lengths.max())
            tokens = tokens[:, : min(-(-longest // 8) * 8, tokens.shape[1])].contiguous()
        ids = None
        if self.config.positives != "none":
            ids = torch.tensor([pair.identity for pair in pairs], dtype=torch.int64)
        batch = Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            tokens=tokens,
            lengths=lengths,
            ids=ids,
            keys=tuple(pair.key for pair in pairs),
            captions=tuple(captions),
            metadata=tuple(pair.metadata for pair in pairs),
            packed=self._packed(tokens),
        )
        return batch.pin() if torch.cuda.is_available() else batch

    def _packed(self, tokens: Tensor) -> tuple[PackedTokens, ...] | None:
        if self.config.text != "packed":
            return None
        part = self.batch_size // self.micro_batches
        multiple = self.config.pack_to_multiple
        return tuple(PackedTokens.pack(rows, multiple=multiple) for rows in tokens.split(part))

    def _usable(self, epoch: int, number: int) -> _Pair:
        """The sample, or where it cannot be used another one, chosen by the same numbers."""
        candidate = number
        for attempt in range(1, _MOST_REPLACEMENTS + 1):
            sample = self.index[candidate]
            try:
                pair = self._pair(sample.key, Members(sample), epoch, candidate)
            except BadSampleError as error:
                self._bad.bad(sample, error)
                self._check_fraction()
                candidate = mix(self.seed, epoch, number, 5, attempt) % len(self.index)
                continue
            self._bad.good()
            return pair
        raise ValueError(
            f"{_MOST_REPLACEMENTS} samples in a row cannot be used "
            f"({dict(self._bad.counts)}); see the messages above"
        )

    def _pair(self, key: str, members: Members, epoch: int, number: int) -> _Pair:
        config = self.config
        texts = members.captions(config.caption_key)
        caption = texts[0]
        if config.sample_caption:
            caption = texts[mix(self.seed, epoch, number, 6) % len(texts)]
        if config.sample_sentence:
            parts = sentences(caption)
            caption = parts[mix(self.seed, epoch, number, 7) % len(parts)]
        metadata, identity = {}, 0
        if config.positives == "caption":
            identity = caption_id(caption)
        elif config.positives == "label":
            metadata = members.metadata()
            identity = metadata.get("label_id")
            if type(identity) is not int or not -(2**63) <= identity < 2**63:
                raise ValueError(
                    f"sample {key} has no whole number of 64 bits as label_id in its json, which "
                    "data.positives=label needs; use data.positives=caption or none"
                )
        image = open_image(
            members.image,
            max_pixels=config.max_pixels,
            apply_orientation=config.apply_orientation,
        )
        box = random_crop(*image.size, config.crop_scale, self.seed, epoch, number)
        pixels = decode(image, box, self.image_size)
        return _Pair(key, pixels, caption, identity, metadata)

    def _check_fraction(self) -> None:
        bad = self._bad
        if bad.seen >= _FEWEST_SEEN and bad.fraction > self.config.max_bad_fraction:
            raise ValueError(
                f"{bad.failed} of {bad.seen} samples drawn cannot be used ({dict(bad.counts)}), "
                f"more than data.max_bad_fraction={self.config.max_bad_fraction}"
            )
