"""The last step of embedding: choose how the features are searched, and prepare it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastclip.search.encoder import Encoder
from fastclip.search.index import file_hash
from fastclip.search.info import INDEX_FILE, Description, VectorsInfo, load_description
from fastclip.search.probes import CANDIDATES, choose_probes, gather
from fastclip.search.records import Part, open_parts
from fastclip.search.vectors import build_lists, find_faiss, list_count

logger = logging.getLogger("fastclip")

VectorsChoice = Literal["auto", "flat", "ivf"]

MOST_FLAT = 100_000
"""Records up to which all are compared unless asked otherwise: some ten milliseconds a query."""

_QUERIES = 500
"""Of each kind that the recall is measured with."""


def build_vectors(
    out: Path, description: Description, encoder: Encoder, choice: VectorsChoice
) -> VectorsInfo:
    """Prepare the search of an index whose parts are all there.

    Raises:
        ImportError: lists are to be made and faiss is not installed.
        ValueError: there are too few records for lists.
    """
    count = description.count
    kind = choice if choice != "auto" else "flat" if count <= MOST_FLAT else "ivf"
    if kind == "flat":
        return VectorsInfo(kind="flat")
    if list_count(count) < 2:
        raise ValueError(f"{count} images are too few for lists: embed with --vectors flat")
    find_faiss()
    if (out / INDEX_FILE).is_file():
        before = load_description(out / INDEX_FILE)
        if before.parts == description.parts and before.vectors and before.vectors.kind == kind:
            return before.vectors
    parts = open_parts(out, description)
    features = [part.features for part in parts]
    logger.info("sorting %d features into %d lists", count, list_count(count))
    file = f"vectors-{count}.safetensors"
    lists = build_lists(features, out / file)
    numbers = np.unique(np.linspace(0, count - 1, min(_QUERIES, count)).astype(np.int64))
    texts = _texts(parts, encoder)
    probes, recall = choose_probes(lists, lists.lists, features, gather(features, numbers), texts)
    logger.info("%d lists are looked through for a query: recall@10 %s", probes, recall)
    return VectorsInfo(
        kind="ivf",
        file=file,
        sha256=file_hash(out / file),
        probes=probes,
        candidates=CANDIDATES,
        recall_images=recall["images"],
        recall_texts=recall.get("texts"),
    )


def _texts(parts: list[Part], encoder: Encoder) -> Tensor:
    """Features of some captions, spread over the index."""
    step = max(1, sum(len(part.places) for part in parts) // (2 * _QUERIES))
    captions: dict[str, None] = {}
    for part in parts:
        for row in range(0, len(part.places), step):
            captions.setdefault(part.caption(row))
    captions.pop("", None)
    chosen = list(captions)
    chosen = chosen[:: max(1, len(chosen) // _QUERIES)][:_QUERIES]
    chosen = [caption for caption in chosen if caption.strip()]
    return encoder.texts(chosen) if chosen else torch.empty(0, encoder.embed_dim)
