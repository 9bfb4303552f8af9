"""The benchmark of linear probes: both providers do the same work."""

from __future__ import annotations

import torch

from benchmarks.bench_probe import PROVIDERS, ProbeCase, make_operands


def test_both_search_and_find_alike() -> None:
    case = ProbeCase(600, 24, 5)
    operands = make_operands(case, torch.device("cpu"))
    assert len(operands.train) == case.images
    assert len(operands.test) == case.images // 5
    ours, theirs = (provider.build(case)(operands) for provider in PROVIDERS)
    assert ours.value > 2 / case.classes
    assert abs(ours.value - theirs.value) <= 0.05
    assert 0.1 < ours.strength / theirs.strength < 10
