"""Training batches: read, cropped, tokenised by threads ahead of the step, in an exact order.

The stream of samples is endless: epoch after epoch of the plan, so that a batch may begin in one
epoch and end in the next and nothing is dropped. Rank r of W takes its share of each global batch.
What a batch holds depends on (seed, position) alone, never on threads or timing.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastclip.data.batch import Batch
from fastclip.data.config import DataConfig
from fastclip.data.dali_rows import DaliRows
from fastclip.data.index import (
    CAPTION_EXTENSION,
    METADATA_EXTENSION,
    index_shards,
    index_sources,
)
from fastclip.data.pairs import Pair, PairMaker, host_decoder
from fastclip.data.plan import WINDOW, Mixture, Plan
from fastclip.data.quarantine import Balance, Quarantine
from fastclip.data.remote import shown, stop_with
from fastclip.data.remote_files import RemoteFile
from fastclip.data.shard_cache import Prefetcher
from fastclip.tokenizer import Tokenizer
from fastclip.tokenizer.packing import PackedTokens

logger = logging.getLogger("fastclip")

_CPU = torch.device("cpu")
_ROWS = 16
"""Of a batch, that a thread decodes at a time: some ten milliseconds."""

_DALI_BATCHES = 2
"""That are under way at once: one decodes while another is assembled. Each takes GPU memory."""


@dataclass(frozen=True)
class _Built:
    batch: Batch
    first: int
    """Of its positions in the stream."""

    replaced: list[bool]
    """Of each row, whether it is another sample than planned."""


class TrainLoader:
    """Endless iterator over this rank's batches.

    Args:
        image_size: side of the squares given, in pixels.
        batch_size: pairs per batch of this rank.
        micro_batches: equal parts that the step computes a batch in; packed texts come in these.
        rank, world_size: which share of each global batch of ``world_size * batch_size`` pairs.
        seed: of order, crops and every other choice.
        device: where the images are wanted; what decodes on a GPU needs to know.
        quarantine: file that names the samples which cannot be used; see `Quarantine`.

    Attributes:
        wait_seconds: time the consumer has spent waiting for batches.

    Raises:
        FileNotFoundError, OSError, ValueError: see `index_shards`; or the usable samples do not
            fill one global batch.
        ImportError: see `build_decoder` and `index_shards`.
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
        quarantine: Path | None = None,
        device: torch.device = _CPU,
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
        config.configure_remote()
        decoder = host_decoder(config)
        self._dali: DaliRows | None = None
        if config.decoder == "dali":
            self._dali = DaliRows(image_size, batch_size, device, config.apply_orientation)
        self._plan: Plan | Mixture
        if config.weights:
            self.index = index_sources(config.train.split("::"), needs=tuple(sorted(needs)))
            self._plan = Mixture(self.index.source_sizes(), config.weights, seed)
        else:
            self.index = index_shards(config.train, needs=tuple(sorted(needs)))
            self._plan = Plan(self.index.sizes, seed)
        if rank == 0:
            self.index.log_problems()
        if self.global_batch_size > len(self.index):
            raise ValueError(
                f"a global batch of {self.global_batch_size} pairs is more than the "
                f"{len(self.index)} usable ones in {shown(config.train)}, so that pairs would be "
                "their own negatives: set a smaller batch or give more shards"
            )
        if isinstance(self._plan, Mixture):
            self._plan.check(self.global_batch_size, shown(config.train).split("::"))
        self._quarantine = Quarantine(quarantine)
        self._pair = PairMaker(
            config, self.index, self._plan, decoder, self._dali, self._quarantine, seed
        )
        self._pin = device.type == "cuda"
        self._balance = Balance(len(self.index), batch_size, rank, world_size)
        self._position = 0
        self._scheduled = 0
        self._queue: deque[Future[_Built]] = deque()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(
            config.threads(), "fastclip-loader", initializer=stop_with, initargs=(self._stop,)
        )
        self._assemblers = ThreadPoolExecutor(
            config.prefetch_batches
            if self._dali is None
            else min(config.prefetch_batches, _DALI_BATCHES),
            "fastclip-batches",
            initializer=stop_with,
            initargs=(self._stop,),
        )
        self._ahead: Prefetcher | None = None
        if any(isinstance(shard, RemoteFile) for shard in self.index.shards):
            self._ahead = Prefetcher(self.index.shards, self._stop)
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
        if self._ahead is not None:
            soon = self._scheduled + self.global_batch_size + WINDOW
            self._ahead(self._plan.shards(self._scheduled, soon))
        while len(self._queue) < self.config.prefetch_batches:
            first = self._scheduled + self.rank * self.batch_size
            # The plan's caches belong to this thread.
            places = [self._plan(first + place) for place in range(self.batch_size)]
            self._queue.append(self._build(first, places))
            self._scheduled += self.global_batch_size
        begin = time.perf_counter()
        try:
            built = self._queue.popleft().result()
        except BaseException:
            self.close()
            raise
        self.wait_seconds += time.perf_counter() - begin
        self._position += self.global_batch_size
        self._balance.add(range(built.first, built.first + self.batch_size), built.replaced)
        for line in self._balance.close_epochs(self._position):
            logger.info("%s", line)
        return built.batch

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer stands; plain data, a few dozen bytes, the same on every rank."""
        return {"seed": self.seed, "position": self._position, "index": self.identity}

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
        if state["index"] != self.identity:
            raise ValueError(
                "the samples are not those of the checkpoint (other shards, or sizes, or other "
                "data.weights, data.caption_key or data.positives, which choose them): restore "
                "them, or start a new run from the weights with run.init_from"
            )
        for future in self._queue:
            future.cancel()
        self._queue.clear()
        self._position = self._scheduled = int(state["position"])
        self._balance.restart(self._position)

    @property
    def identity(self) -> str:
        """Of the samples and their order, but for the seed: 16 hexadecimal digits."""
        if not self.config.weights:
            return self.index.hash
        mixture = repr((self.index.hash, self.index.sources, self.config.weights))
        return hashlib.blake2b(mixture.encode(), digest_size=8).hexdigest()

    def report(self) -> dict[str, int]:
        """Counts of what could not be used: in the shards' structure, and on decoding."""
        counts: dict[str, int] = {}
        for problem in self.index.problems:
            counts[problem.kind] = counts.get(problem.kind, 0) + 1
        for kind, count in self._quarantine.counts.items():
            counts[kind] = counts.get(kind, 0) + count
        return counts

    def close(self) -> None:
        """Stop the threads; batches under way are thrown away."""
        self._closed = True
        self._stop.set()
        self._queue.clear()
        if self._ahead is not None:
            self._ahead.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._assemblers.shutdown(wait=True, cancel_futures=True)
        if self._dali is not None:
            self._dali.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _build(self, first: int, places: list[tuple[int, int]]) -> Future[_Built]:
        """Have threads decode a batch's rows, a few each, and another one put them together."""
        side = self.image_size
        images = torch.empty(
            (len(places), side, side, 3),
            dtype=torch.uint8,
            pin_memory=self._pin and self._dali is None,
        )
        parts = [
            self._pool.submit(self._rows, places[row : row + _ROWS], images[row : row + _ROWS])
            for row in range(0, len(places), _ROWS)
        ]
        return self._assemblers.submit(self._assemble, first, places, images, parts)

    def _rows(self, places: list[tuple[int, int]], images: Tensor) -> list[tuple[Pair, bool]]:
        defer = self._dali is not None
        rows = zip(places, images.numpy(), strict=True)
        return [self._pair(epoch, number, pixels, defer) for (epoch, number), pixels in rows]

    def _assemble(
        self,
        first: int,
        places: list[tuple[int, int]],
        images: Tensor,
        parts: list[Future[list[tuple[Pair, bool]]]],
    ) -> _Built:
        rows = [row for part in parts for row in part.result()]
        pairs, replaced = [pair for pair, _ in rows], [other for _, other in rows]
        if self._dali is None:
            return _Built(self._batch(pairs, images), first, replaced)
        pixels = images.numpy()
        later = {row: (p.image, p.box) for row, p in enumerate(pairs) if not p.decoded}
        batch, ready, failed = self._dali.fill(pixels, later)
        for _ in range(len(later) - len(failed)):
            self._quarantine.good()
        for row, reason in failed.items():
            logger.debug("%s: %s; decoded on the CPU instead", pairs[row].key, reason)
            pairs[row], replaced[row] = self._pair(*places[row], pixels[row])
        if failed:
            ready = self._dali.replace(batch, pixels, list(failed))
        return _Built(self._batch(pairs, batch, ready), first, replaced)

    def _batch(
        self, pairs: Sequence[Pair], images: Tensor, ready: torch.cuda.Event | None = None
    ) -> Batch:
        captions = [pair.caption for pair in pairs]
        tokens, lengths = self.tokenizer.encode_batch(captions)
        if self.config.text == "trimmed":
            longest = int(lengths.max())
            tokens = tokens[:, : min(-(-longest // 8) * 8, tokens.shape[1])].contiguous()
        ids = None
        if self.config.positives != "none":
            ids = torch.tensor([pair.identity for pair in pairs], dtype=torch.int64)
        batch = Batch(
            images=images.permute(0, 3, 1, 2),
            tokens=tokens,
            lengths=lengths,
            ids=ids,
            keys=tuple(pair.key for pair in pairs),
            captions=tuple(captions),
            metadata=tuple(pair.metadata for pair in pairs),
            packed=self._packed(tokens),
            ready=ready,
        )
        return batch.pin() if self._pin else batch

    def _packed(self, tokens: Tensor) -> tuple[PackedTokens, ...] | None:
        if self.config.text != "packed":
            return None
        part = self.batch_size // self.micro_batches
        multiple = self.config.pack_to_multiple
        return tuple(PackedTokens.pack(rows, multiple=multiple) for rows in tokens.split(part))
