"""The losses as their papers write them: the whole N×N matrix, fp64, autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Expected(NamedTuple):
    """A loss and its gradients in fp64."""

    loss: Tensor
    d_image: Tensor
    d_text: Tensor
    d_scale: Tensor
    d_bias: Tensor | None


def features(pairs: int, dims: int, seed: int = 0, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    """Unit-length features of related pairs, fp64."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(pairs, dims, generator=generator, dtype=torch.float64)
    text = image + noise * torch.randn(pairs, dims, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def clip_expected(
    image: Tensor,
    text: Tensor,
    scale: float,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Expected:
    """InfoNCE in both directions, targets even over positives, smoothed over all."""
    x, y, s = _leaves(image, text, scale)
    logits = s * x @ y.T
    targets = _positives(len(image), ids)
    targets = targets / targets.sum(1, keepdim=True)
    targets = targets * (1 - label_smoothing) + label_smoothing / len(image)
    rows = -(targets * logits.log_softmax(1)).sum(1).mean()
    columns = -(targets.T * logits.T.log_softmax(1)).sum(1).mean()
    loss = (rows + columns) / 2
    loss.backward()
    return Expected(loss.detach(), x.grad, y.grad, s.grad, None)  # pyright: ignore[reportArgumentType]


def siglip_expected(
    image: Tensor, text: Tensor, scale: float, bias: float, ids: Tensor | None = None
) -> Expected:
    """Sum of the N×N binary cross-entropies, over N."""
    x, y, s = _leaves(image, text, scale)
    b = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    signs = 2 * _positives(len(image), ids) - 1
    loss = -F.logsigmoid(signs * (s * x @ y.T + b)).sum() / len(image)
    loss.backward()
    return Expected(loss.detach(), x.grad, y.grad, s.grad, b.grad)  # pyright: ignore[reportArgumentType]


def error(value: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """‖Δ‖ / max(‖reference‖, floor)."""
    difference = (value.double() - reference.double()).norm()
    return float(difference / max(float(reference.double().norm()), floor, 1e-300))


def _leaves(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    x = image.detach().double().requires_grad_()
    y = text.detach().double().requires_grad_()
    return x, y, torch.tensor(scale, dtype=torch.float64, requires_grad=True)


def _positives(pairs: int, ids: Tensor | None) -> Tensor:
    if ids is None:
        return torch.eye(pairs, dtype=torch.float64)
    return (ids[:, None] == ids[None, :]).double()
