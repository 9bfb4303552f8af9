"""Image features of a data set, for zero-shot, linear probes and neighbours alike."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastclip.data.eval_loader import EvalBatch, SampleSource
from fastclip.distributed.collectives import all_gather_objects, all_gather_rows
from fastclip.eval.evaluator import Evaluator

_FORMAT = "fastclip features 1"
_TENSORS = ("embedding", "representation", "labels")
_HEADER_BYTES = 90_000_000
"""Keys that a file may name; safetensors reads no header above 100 MB."""


@dataclass(frozen=True)
class Features:
    """What a model makes of the images of a data set, and what is known of them.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """

    embedding: Tensor
    """fp32 [N, D], of unit length: what zero-shot uses."""

    representation: Tensor
    """fp32 [N, W]: before the projection for Vision Transformers; what linear probes use."""

    labels: Tensor
    """int64 [N], or bool [N, C] where an image may have several classes."""

    keys: tuple[str, ...]
    """Names of the samples."""

    def __post_init__(self) -> None:
        count = len(self.keys)
        for name in ("embedding", "representation"):
            _check_floats(name, getattr(self, name), count)
        labels = self.labels
        ndim = {torch.int64: 1, torch.bool: 2}.get(labels.dtype)
        if labels.ndim != ndim or len(labels) != count:
            raise ValueError(
                f"labels of {count} images are int64 [{count}] or bool [{count}, classes], not "
                f"{labels.dtype} {list(labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Features:
        """The same on `device`, where probes then work."""
        return dataclasses.replace(
            self, **{name: getattr(self, name).to(device) for name in _TENSORS}
        )

    def rows(self, places: Tensor) -> Features:
        """Some of the images, in the order of `places`, int64 [M]."""
        tensors = {name: getattr(self, name)[places] for name in _TENSORS}
        return Features(**tensors, keys=tuple(self.keys[place] for place in places.tolist()))

    def followed_by(self, other: Features) -> Features:
        """These images and then those of `other`."""
        tensors = {
            name: torch.cat([getattr(self, name), getattr(other, name)]) for name in _TENSORS
        }
        return Features(**tensors, keys=self.keys + other.keys)


def extract_features(
    evaluator: Evaluator,
    source: SampleSource,
    label_of: Callable[[EvalBatch], tuple[Tensor, Tensor]],
) -> Features:
    """Features of every image of `source`, in its order; collective, the same on every rank.

    One pass through the image tower gives both kinds. The model computes in evaluation mode and is
    put back into the mode it was in.

    Args:
        label_of: from a batch that is not empty to the labels of the rows that are kept, int64 [K]
            or bool [K, C], and which these are, bool [B].

    Returns:
        Features on the CPU.

    Raises:
        ValueError: `label_of` says so, on every rank then; or no image is left.
    """
    embeddings, representations, labels = [], [], []
    keys: list[str] = []
    places: list[int] = []
    problem: ValueError | None = None
    model, device = evaluator.model, evaluator.runtime.device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in evaluator.batches(source):
                kept = torch.zeros(len(batch), dtype=torch.bool)
                if len(batch) and problem is None:
                    try:
                        found, kept = _checked_labels(batch, *label_of(batch))
                        labels.append(found)
                    except ValueError as error:
                        problem = error  # told after the loop: other ranks still wait for this one
                embedding, representation = model.represent(batch.images[kept].to(device))
                embeddings.append(embedding.float())
                representations.append(representation.float())
                rows = kept.nonzero()[:, 0].tolist()
                keys.extend(batch.keys[row] for row in rows)
                places.extend(batch.numbers[row] for row in rows)
    finally:
        model.train(training)

    kind = (labels[0].dtype, tuple(labels[0].shape[1:])) if labels else None
    everyone = all_gather_objects((keys, places, kind, problem))
    for *_, failed in everyone:
        if failed is not None:
            raise failed
    sizes = [len(own) for own, *_ in everyone]
    if not sum(sizes):
        raise ValueError("no image of the data set could be read and has a label")
    dtype, width = next(kind for _, _, kind, _ in everyone if kind is not None)
    order = torch.tensor([place for _, own, *_ in everyone for place in own]).argsort()
    all_keys = [key for own, *_ in everyone for key in own]

    def gathered(parts: list[Tensor]) -> Tensor:
        return all_gather_rows(torch.cat(parts).to(device), sizes).cpu()[order]

    none = torch.zeros((0, *width), dtype=torch.uint8 if dtype == torch.bool else dtype)
    return Features(
        embedding=gathered(embeddings),
        representation=gathered(representations),
        labels=gathered([none, *(part.to(none.dtype) for part in labels)]).to(dtype),
        keys=tuple(all_keys[row] for row in order.tolist()),
    )


def _checked_labels(batch: EvalBatch, labels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    if kept.shape != (len(batch),) or kept.dtype != torch.bool or len(labels) != int(kept.sum()):
        raise ValueError(
            f"label_of gives labels of the kept rows and a bool mask of all {len(batch)} rows, not "
            f"{list(labels.shape)} and {kept.dtype} {list(kept.shape)}"
        )
    return labels, kept


def save_features(features: Features, path: Path) -> None:
    """Write features as safetensors, the samples' names as JSON in its metadata.

    Raises:
        ValueError: the names are too many for the file's header.
    """
    names = json.dumps(features.keys)
    if len(json.dumps(names)) > _HEADER_BYTES:
        raise ValueError(
            f"{path}: the names of {len(features):,} samples do not fit into a safetensors header; "
            "save parts of them"
        )
    tensors = {name: getattr(features, name).cpu().contiguous() for name in _TENSORS}
    scratch = path.with_name(f".{path.name}.partial")
    save_file(tensors, scratch, {"format": _FORMAT, "keys": names})
    os.replace(scratch, path)


def load_features(path: Path) -> Features:
    """Read what `save_features` has written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: save_features writes such files")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT or set(file.keys()) != set(_TENSORS):
                raise ValueError("it holds no features")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        keys = json.loads(about["keys"])
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its keys are no list of texts")
        return Features(**tensors, keys=tuple(keys))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded as features: {error}") from None


def _check_floats(name: str, x: Tensor, count: int) -> None:
    if x.dtype != torch.float32 or x.ndim != 2 or len(x) != count:
        raise ValueError(
            f"{name} of {count} images is fp32 [{count}, width], not {x.dtype} {list(x.shape)}"
        )
