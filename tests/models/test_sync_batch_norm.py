"""Synchronised BatchNorm on several ranks against nn.BatchNorm2d on the concatenated batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fastclip.models.layers import SynchronizedBatchNorm2d, convert_sync_batch_norm
from ranks import run_ranks

CHANNELS = 5


def _network(momentum: float | None) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    layers = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1),
        nn.BatchNorm2d(CHANNELS, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, 4, 1),
        nn.BatchNorm2d(4, momentum=momentum),
    )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layers


def _inputs(rows: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(rows, 3, 7, 6, generator=generator) * 2 + 1
    return images, torch.randn(rows, 4, 7, 6, generator=generator)


def _train(
    network: nn.Module, images: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    images = images.clone().requires_grad_()
    output = network(images)
    (output * weights).sum().backward()
    assert images.grad is not None
    return output.detach(), images.grad


def _on_rank(runtime, sizes: tuple[int, ...], momentum: float | None):
    network = convert_sync_batch_norm(_network(momentum), None)
    assert sum(type(layer) is SynchronizedBatchNorm2d for layer in network.modules()) == 2
    ends = list(itertools.accumulate(sizes))
    mine = slice(ends[runtime.rank] - sizes[runtime.rank], ends[runtime.rank])
    steps = []
    for step in range(2):
        images, weights = _inputs(sum(sizes), step)
        steps.append(_train(network, images[mine], weights[mine]))
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return steps, gradients, dict(network.named_buffers())


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


@pytest.mark.parametrize(
    ("sizes", "momentum"), [((4,), 0.1), ((3, 2), 0.1), ((1, 3, 0), None)], ids=["1", "2", "3"]
)
def test_ranks_equal_one_process_on_the_concatenated_batch(sizes, momentum, tmp_path):
    ranks = run_ranks(_on_rank, len(sizes), tmp_path, sizes, momentum)
    reference = _network(momentum)
    for step in range(2):
        output, input_gradient = _train(reference, *_inputs(sum(sizes), step))
        assert _close(torch.cat([r[0][step][0] for r in ranks]), output)
        assert _close(torch.cat([r[0][step][1] for r in ranks]), input_gradient)
    parameters = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    scale = max(float(gradient.norm()) for gradient in parameters.values())
    for name, expected in parameters.items():
        total = torch.stack([rank[1][name] for rank in ranks]).sum(0)
        # A bias before BatchNorm has gradient zero: its rounding is measured against the others.
        floor = max(float(expected.norm()), 0.1 * scale)
        assert float((total - expected).norm()) <= 1e-5 * floor, name
    for name, expected in reference.named_buffers():
        for rank in ranks:
            assert rank[2][name].dtype == expected.dtype
            assert _close(rank[2][name].double(), expected.double()), name
