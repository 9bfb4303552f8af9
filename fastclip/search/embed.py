"""`fastclip embed`: the images of shards as an index that is searched."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastclip.data.decoders import build_decoder
from fastclip.data.index import ShardIndex, index_shards
from fastclip.data.reader import check_caption_key
from fastclip.data.remote import shown, stop_with
from fastclip.data.remote_files import Shard
from fastclip.data.rewriting import alone, write_text
from fastclip.data.shard_cache import size_of
from fastclip.distributed.launcher import check_alone
from fastclip.search.building import VectorsChoice, build_vectors
from fastclip.search.encoder import Encoder
from fastclip.search.info import (
    FORMAT,
    INDEX_FILE,
    UNFINISHED_FILE,
    Description,
    FeatureDtype,
    ModelInfo,
    PartInfo,
    ShardInfo,
    load_description,
    save_description,
)
from fastclip.search.outputs import check_folder
from fastclip.search.progress import Progress
from fastclip.search.reading import Batch, read_batch
from fastclip.search.records import open_parts, write_part

logger = logging.getLogger("fastclip")

PART_SAMPLES = 4096
"""Of one file: what a killed run has to do again at most."""

QUARANTINE_FILE = "quarantine.jsonl"
DEFAULT_FIELDS = ("label", "style", "group")


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """How images are embedded."""

    batch_size: int = 64
    workers: int = 2
    """Threads that decode images."""

    device: str = "auto"
    vectors: VectorsChoice = "auto"
    dtype: FeatureDtype = "float16"
    """Of the features as they are kept. Half precision moves a score by less than 0.001."""

    fields: tuple[str, ...] = DEFAULT_FIELDS
    """Of the json member, kept so that searches can be filtered by them."""

    caption_key: str = "txt"
    """As in `DataConfig`."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        check_caption_key(self.caption_key, "caption_key")
        for field in self.fields:
            if not field or "=" in field:
                raise ValueError(f"{field!r} is no name of a field")


def embed(pattern: str, model_path: Path, out: Path, settings: EmbedSettings) -> Description:
    """Embed the images of shards into the index `out`, which is begun, gone on with or added to.

    Parts that are there are not made again, so that a run that was killed goes on, and its index is
    the same to the bit as one that was not. Shards that the index has already are left alone.

    Args:
        pattern: of the shards; see `expand_shards`.
        model_path: a run or checkpoint.

    Raises:
        FileNotFoundError, OSError: no shards, no model, or one that cannot be read.
        ValueError: the index was made with another model or other settings, a shard in it has
            changed, another process works on it, `out` is a file, or not one image can be used.
        ImportError: faiss is needed and not installed.
    """
    check_alone("fastclip embed")
    check_folder(out, "--out")
    encoder = Encoder(model_path, device=settings.device)
    index = index_shards(pattern, needs=())
    index.log_problems()
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, out, "embedding"):
        description = _plan(out, index, encoder, settings, shown(pattern))
        description = _embed_parts(out, index, encoder, settings, description)
        if not description.count:
            raise ValueError(
                f"not one image of {shown(pattern)} could be used: {out / QUARANTINE_FILE} says why"
            )
        vectors = build_vectors(out, description, encoder, settings.vectors)
        finished = replace(description, vectors=vectors)
        save_description(out / INDEX_FILE, finished)
        (out / UNFINISHED_FILE).unlink(missing_ok=True)
        _tidy(out, finished)
    return finished


def _plan(
    out: Path, index: ShardIndex, encoder: Encoder, settings: EmbedSettings, pattern: str
) -> Description:
    """What there is already, with the shards that are to be embedded added."""
    model = _model_info(encoder)
    begun = Description(
        format=FORMAT,
        model=model,
        dtype=settings.dtype,
        caption_key=settings.caption_key,
        fields=settings.fields,
        patterns=(),
        shards=(),
        parts=(),
        vectors=None,
    )
    for name in (UNFINISHED_FILE, INDEX_FILE):
        if (out / name).is_file():
            found = load_description(out / name)
            _check_same(out, found, begun)
            begun = found
            break
    known = {shard.address: place for place, shard in enumerate(begun.shards)}
    shards = list(begun.shards)
    given = set()
    for place, shard in enumerate(index.shards):
        info = _shard_info(index, place, shard)
        given.add(info.address)
        if info.address not in known:
            shards.append(info)
        elif shards[known[info.address]] != info:
            raise ValueError(
                f"{info.address} is not what it was when it was embedded into {out}: embed into "
                "another folder, or remove this one"
            )
    done = [0] * len(shards)
    for part in begun.parts:
        done[part.shard] += part.samples
    for shard, samples in zip(begun.shards, done, strict=False):
        if samples < shard.samples and shard.address not in given:
            raise ValueError(
                f"{out} is not finished: name the shards that it was begun with too, among them "
                f"{shard.address}"
            )
    patterns = tuple(dict.fromkeys([*begun.patterns, pattern]))
    return replace(begun, shards=tuple(shards), patterns=patterns, vectors=None)


def _check_same(out: Path, there: Description, here: Description) -> None:
    if there.model.digest != here.model.digest:
        raise ValueError(
            f"{out} was made with the model {there.model.digest[:12]} ({there.model.path}), and "
            f"this is {here.model.digest[:12]} ({here.model.path}): name another folder"
        )
    for name in ("dtype", "caption_key", "fields"):
        before, now = getattr(there, name), getattr(here, name)
        if before != now:
            raise ValueError(f"{out} was made with {name} {before}, not {now}: give the same")
    if there.model.apply_orientation != here.model.apply_orientation:
        raise ValueError(
            f"{out} was made with images turned by their EXIF data "
            f"({there.model.apply_orientation}) otherwise than the run of {here.model.path} says"
        )


def _model_info(encoder: Encoder) -> ModelInfo:
    config = encoder.model.config
    return ModelInfo(
        digest=encoder.digest,
        path=str(encoder.path),
        embed_dim=encoder.embed_dim,
        image_size=encoder.image_size,
        image_mean=config.image_mean,
        image_std=config.image_std,
        context_length=config.text.context_length,
        apply_orientation=encoder.apply_orientation,
    )


def _shard_info(index: ShardIndex, place: int, shard: Shard) -> ShardInfo:
    digest = hashlib.sha256()
    for number in index.numbers(place):
        sample = index[number]
        line = f"{sample.key}\0{sample.image}{sample.caption}{sample.metadata}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return ShardInfo(
        address=str(shard.resolve()) if isinstance(shard, Path) else str(shard),
        size=size_of(shard),
        digest=digest.hexdigest(),
        samples=index.sizes[place],
    )


def _embed_parts(
    out: Path,
    index: ShardIndex,
    encoder: Encoder,
    settings: EmbedSettings,
    description: Description,
) -> Description:
    """Write the parts that are not there yet."""
    todo = list(_todo(index, description))
    without: Counter[str] = Counter()
    progress = Progress("embedding", sum(len(numbers) for _, _, numbers in todo))
    batches = _batches(index, encoder, settings, [numbers for _, _, numbers in todo])
    with contextlib.closing(batches), progress:
        for shard, first, numbers in todo:
            features, rows, bad = [torch.empty(0, encoder.embed_dim)], [], []
            for batch in itertools.islice(batches, -(-len(numbers) // settings.batch_size)):
                if batch.rows:
                    features.append(_features(encoder, batch))
                rows += batch.rows
                bad += batch.bad
                without.update(batch.without)
                progress.advance(len(batch.rows) + len(batch.bad))
            file = f"part-{len(description.parts):05d}.safetensors"
            digest = write_part(
                out / file, torch.cat(features), rows, settings.fields, bad, settings.dtype
            )
            part = PartInfo(
                file=file,
                shard=shard,
                first=first,
                samples=len(numbers),
                records=len(rows),
                sha256=digest,
            )
            description = replace(description, parts=(*description.parts, part))
            save_description(out / UNFINISHED_FILE, description)
    for kind, count in without.items():
        logger.warning("%d image(s) embedded without a part that is unusable: %s", count, kind)
    _write_quarantine(out, description)
    return description


def _todo(index: ShardIndex, description: Description) -> Iterator[tuple[int, int, range]]:
    """Of each part that is to be made: its shard in the index, its first sample's place in the
    shard, and the samples' numbers among those that are read now."""
    done = {(part.shard, part.first) for part in description.parts}
    places = {
        str(shard.resolve()) if isinstance(shard, Path) else str(shard): place
        for place, shard in enumerate(index.shards)
    }
    for number, shard in enumerate(description.shards):
        for first in range(0, shard.samples, PART_SAMPLES):
            if (number, first) not in done:
                samples = index.numbers(places[shard.address])
                yield number, first, samples[first : first + PART_SAMPLES]


def _batches(
    index: ShardIndex, encoder: Encoder, settings: EmbedSettings, parts: Iterable[range]
) -> Generator[Batch, None, None]:
    """The samples of `parts` in order, decoded ahead by some threads; none is of two parts."""
    decoder = build_decoder("auto", apply_orientation=encoder.apply_orientation)
    how = (decoder, encoder.image_size, settings.caption_key, settings.fields)
    stop = threading.Event()
    with ThreadPoolExecutor(settings.workers, "fastclip-embed", stop_with, (stop,)) as pool:
        queue: deque[Future[Batch]] = deque()
        try:
            for part in parts:
                for first in range(0, len(part), settings.batch_size):
                    numbers = part[first : first + settings.batch_size]
                    queue.append(pool.submit(read_batch, index, numbers, *how))
                    if len(queue) > settings.workers + 1:
                        yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:  # who is interrupted need not wait for shards on other machines
            stop.set()
            for future in queue:
                future.cancel()


def _features(encoder: Encoder, batch: Batch) -> Tensor:
    features = encoder.features(torch.from_numpy(batch.pixels))
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        key = batch.rows[int(finite.logical_not().nonzero()[0])].key
        raise ValueError(f"the model {encoder.path} has no finite feature for {key}: it is broken")
    return features


def _write_quarantine(out: Path, description: Description) -> None:
    """All parts' samples that could not be used, as `fastclip.data.quarantine` writes them."""
    parts = open_parts(out, description)
    lines = [json.dumps(entry) + "\n" for part in parts for entry in part.quarantine]
    write_text(out / QUARANTINE_FILE, "".join(lines))


def _tidy(out: Path, description: Description) -> None:
    """Remove what earlier runs left: vectors of fewer records, and files that were not finished."""
    kept = {part.file for part in description.parts}
    kept |= {description.vectors.file} if description.vectors is not None else set()
    for pattern in ("part-*.safetensors*", "vectors-*.safetensors*"):
        for path in out.glob(pattern):
            if path.name not in kept:
                path.unlink()
