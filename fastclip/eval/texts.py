"""Texts through the text tower: without padding, those of like lengths together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip.distributed.collectives import all_gather_rows
from fastclip.distributed.runtime import Runtime
from fastclip.eval.evaluator import Evaluator
from fastclip.tokenizer.packing import PackedTokens

_MULTIPLE = 256
"""Of a GPU's packed tokens, so that what is compiled or replayed as a graph sees few shapes."""


def own_share(texts: Sequence[str], runtime: Runtime) -> tuple[Sequence[str], list[int]]:
    """This rank's part of the texts, and how many each rank has: all as many, but the last ones."""
    share = -(-len(texts) // runtime.world_size)
    sizes = [max(0, min(share, len(texts) - r * share)) for r in range(runtime.world_size)]
    return texts[runtime.rank * share : (runtime.rank + 1) * share], sizes


def text_features(evaluator: Evaluator, texts: Sequence[str]) -> Tensor:
    """Unit-length features of the texts, fp32 [T, D], on every rank; collective.

    Args:
        texts: the same on every rank, at least one.
    """
    own, sizes = own_share(texts, evaluator.runtime)
    return all_gather_rows(own_text_features(evaluator, own, max(sizes)), sizes)


def own_text_features(evaluator: Evaluator, texts: Sequence[str], most: int) -> Tensor:
    """Unit-length features of this rank's texts, fp32 [T, D].

    Every rank makes the same number of forward passes, some perhaps of no text, so that sharded
    parameters can be gathered.

    Args:
        most: texts of the rank that has the most of them.
    """
    model, device = evaluator.model, evaluator.runtime.device
    tokens, lengths = evaluator.tokenizer.encode_batch(texts)
    lengths, order = lengths.sort(stable=True)
    features = []
    for begin in range(0, most, evaluator.batch_size):
        rows = tokens[order[begin : begin + evaluator.batch_size]]
        longest = int(lengths[begin : begin + evaluator.batch_size].max()) if len(rows) else 1
        batch = _pack(rows[:, :longest], model.autocast_dtype, device)
        features.append(model(tokens=batch).text_features)
    return torch.cat(features)[order.argsort().to(device)]


def _pack(rows: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor | PackedTokens:
    """Texts of like lengths as the tower computes them fastest.

    A GPU attends to packed texts in half precision alone; in fp32 rows lose little, being sorted.
    """
    if device.type == "cpu":
        return PackedTokens.pack(rows)
    if dtype is None:
        return rows.to(device)
    return PackedTokens.pack(rows, multiple=_MULTIPLE).to(device)
