"""What the similarity kernels mean, in plain PyTorch: specification, CPU path and test oracle.

M queries and N keys of D dims. The similarity of query i and key j is s·⟨q_i, k_j⟩, with
`normalize` divided by max(‖q_i‖, 1e-12)·max(‖k_j‖, 1e-12) (cosine similarity as `F.normalize`
defines it; zero rows have similarity zero). Features are upcast to fp32 (fp64 stays fp64) before
anything is multiplied; norms and scale are applied to the product, so that no normalised features
are rounded to their dtype.

The order of `similarity_topk` is that of a stable descending sort: NaN first (as `torch.sort` puts
it, so that a broken feature shows), equal similarities by ascending index, −0 equal to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.kernels.reference import CHUNK_ELEMENTS, NORM_FLOOR, compute_dtype

MAX_K = 1024
"""Most neighbours that `similarity_topk` finds."""


class SimilarityGradients(NamedTuple):
    """Gradients with respect to the operands, in compute dtype; None where not asked for."""

    d_queries: Tensor | None
    """[M, D]."""

    d_keys: Tensor | None
    """[N, D]."""

    d_scale: Tensor
    """[]."""


class Neighbours(NamedTuple):
    """The nearest keys of each query, nearest first."""

    values: Tensor
    """[M, k], similarities in compute dtype."""

    indices: Tensor
    """int64 [M, k], places among the keys."""


def norms(features: Tensor) -> Tensor:
    """max(‖x‖, 1e-12) of each row in compute dtype, [rows]."""
    dtype = compute_dtype(features.dtype)
    return torch.linalg.vector_norm(features, dim=1, dtype=dtype).clamp_min(NORM_FLOOR)


def similarity(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    normalize: bool,
    out_dtype: torch.dtype,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Similarities of all queries with all keys, `out_dtype` [M, N].

    Args:
        queries: [M, D].
        keys: [N, D].
        scale: [], multiplies the similarities.
        normalize: divide by the norms.
        out_dtype: what the result, computed in fp32 or fp64, is rounded to.
        chunk_elements: similarities held in compute dtype at a time.
    """
    result = queries.new_empty((queries.shape[0], keys.shape[0]), dtype=out_dtype)
    scale = scale.to(compute_dtype(queries.dtype)).reshape(())
    for chunk, scores in _scores(queries, keys, normalize, chunk_elements):
        result[chunk] = scores.mul_(scale)
    return result


def similarity_gradients(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    normalize: bool,
    need_queries: bool = True,
    need_keys: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> SimilarityGradients:
    """Gradients of `similarity`, given the loss's with respect to its result, [M, N]."""
    dtype = compute_dtype(queries.dtype)
    queries, keys, scale = (x.to(dtype) for x in (queries, keys, scale))
    return gradients_by(
        torch.matmul,
        gradient,
        queries,
        keys,
        scale.reshape(()),
        (norms(queries), norms(keys)) if normalize else None,
        need_queries,
        need_keys,
        chunk_elements,
    )


def gradients_by(
    product: Callable[[Tensor, Tensor], Tensor],
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    both_norms: tuple[Tensor, Tensor] | None,
    need_queries: bool,
    need_keys: bool,
    chunk_elements: int,
) -> SimilarityGradients:
    """The gradients from products of weights [a, b] in compute dtype with features [b, D].

    The weights are the gradient divided by the other side's norms. The scale's gradient,
    Σ_ij G_ij·S_ij / s, is Σ_i ⟨q̂_i, Σ_j G_ij k̂_j⟩: the similarities are not computed again.
    """
    dtype = scale.dtype
    query_norms, key_norms = both_norms if both_norms is not None else (None, None)
    # One of the two products is needed for the scale's gradient.
    for_queries = need_queries or not need_keys
    d_queries = queries.new_empty(queries.shape, dtype=dtype) if for_queries else None
    d_keys = keys.new_zeros(keys.shape, dtype=dtype) if need_keys else None
    for chunk in _chunks(queries.shape[0], keys.shape[0], chunk_elements):
        weights = gradient[chunk].to(dtype)
        if d_queries is not None:
            d_queries[chunk] = product(_divided(weights, key_norms), keys)
        if d_keys is not None:
            by = None if query_norms is None else query_norms[chunk, None]
            d_keys += product(_divided(weights, by).T, queries[chunk])
        del weights  # before the next chunk's are made
    total = scale.new_zeros(())
    if d_keys is not None:
        total = _through_norm(d_keys, keys, key_norms)
        d_keys *= scale
    if d_queries is not None:
        total = _through_norm(d_queries, queries, query_norms)
        d_queries *= scale
    return SimilarityGradients(d_queries if need_queries else None, d_keys, total)


def _divided(weights: Tensor, norms: Tensor | None) -> Tensor:
    return weights if norms is None else weights / norms


def similarity_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    normalize: bool,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Neighbours:
    """The k nearest keys of each query; the order is stated at the top of this module.

    Args:
        queries: [M, D].
        keys: [N, D].
        k: how many; at most min(N, `MAX_K`).
        normalize: divide by the norms.
        chunk_elements: similarities held at a time.
    """
    dtype = compute_dtype(queries.dtype)
    values = queries.new_empty((queries.shape[0], k), dtype=dtype)
    indices = queries.new_empty((queries.shape[0], k), dtype=torch.int64)
    for chunk, scores in _scores(queries, keys, normalize, chunk_elements):
        values[chunk], indices[chunk] = _largest(scores, k)
    return Neighbours(values, indices)


def sortable(scores: Tensor) -> Tensor:
    """fp32 scores as int32 of the same order: −0 as 0, every NaN the greatest."""
    bits = scores.view(torch.int32)
    order = torch.where(bits < 0, torch.iinfo(torch.int32).min - bits, bits)
    return order.masked_fill_(scores.isnan(), torch.iinfo(torch.int32).max)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of each row's k largest, in the order of a stable sort."""
    if scores.dtype == torch.float64:
        values, indices = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]
    # Score and index in one number make every entry different: torch.topk, which keeps no order
    # among equals but is far cheaper than a sort, has then one answer only.
    places = torch.arange(scores.shape[1], device=scores.device)
    unique = (sortable(scores).long() << 32) - places
    indices = unique.topk(k, dim=1).indices
    return scores.gather(1, indices), indices


def _scores(
    queries: Tensor, keys: Tensor, normalize: bool, chunk_elements: int
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of queries, and their products with all keys, divided by the norms if asked."""
    dtype = compute_dtype(queries.dtype)
    key_norms = norms(keys) if normalize else None
    columns = keys.to(dtype).T
    for chunk in _chunks(queries.shape[0], keys.shape[0], chunk_elements):
        rows = queries[chunk].to(dtype)
        scores = rows @ columns
        if key_norms is not None:
            scores.div_(norms(rows)[:, None]).div_(key_norms)
        yield chunk, scores


def _through_norm(gradient: Tensor, features: Tensor, own_norms: Tensor | None) -> Tensor:
    """Turn Σ_j G_ij k̂_j into the gradient of q_i, in place; give back Σ_i ⟨q̂_i, Σ_j G_ij k̂_j⟩."""
    if own_norms is None:
        return (features * gradient).sum()
    gradient /= own_norms[:, None]
    along = (features * gradient).sum(1)
    # A norm below the threshold is no function of its features.
    factor = (along / own_norms / own_norms).masked_fill_(own_norms <= NORM_FLOOR, 0.0)
    gradient.addcmul_(features, factor[:, None], value=-1)
    return along.sum()


def _chunks(rows: int, count: int, chunk_elements: int) -> Iterator[slice]:
    size = max(1, chunk_elements // max(count, 1))
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))
