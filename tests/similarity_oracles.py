"""Similarity and nearest keys as their definitions say: normalised copies, the matrix, a sort."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def raw_features(queries: int, keys: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of differing lengths, fp32."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(dims, generator=generator)
    return tuple(
        (torch.randn(rows, dims, generator=generator) + shared)
        * (0.25 + 2 * torch.rand(rows, 1, generator=generator))
        for rows in (queries, keys)
    )  # pyright: ignore[reportReturnType]


def axes(rows: int, dims: int, seed: int) -> Tensor:
    """Rows with one entry, ± a power of two, or none: exact similarities of −1, 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(0, dims, (rows, 1), generator=generator)
    power = torch.randint(-3, 4, (rows, 1), generator=generator)
    sign = torch.randint(-1, 2, (rows, 1), generator=generator)
    return torch.zeros(rows, dims).scatter_(1, place, sign * 2.0**power)


def whole_numbers(rows: int, dims: int, seed: int) -> Tensor:
    """Features from −4 to 4: their products are exact in any dtype and order, and often equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (rows, dims), generator=generator).float()


def expected_similarity(queries: Tensor, keys: Tensor, scale: float, normalize: bool) -> Tensor:
    """[M, N] in fp64."""
    queries, keys = queries.double(), keys.double()
    if normalize:
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    return scale * queries @ keys.T


def expected_gradients(
    upstream: Tensor, queries: Tensor, keys: Tensor, scale: float, normalize: bool
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and scale in fp64, by autograd through `F.normalize`."""
    number = torch.tensor(scale, dtype=torch.float64)
    leaves = [x.detach().double().requires_grad_() for x in (queries, keys, number)]
    q, k, s = leaves
    if normalize:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    return torch.autograd.grad(s * q @ k.T, leaves, upstream.double())


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A whole matrix's k largest of each row, equal ones by ascending index."""
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]
