"""Collectives with unequal shares, and their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.distributed.collectives import (
    all_gather_integers,
    all_gather_objects,
    all_gather_rows,
    all_reduce_sum,
    any_rank,
    broadcast_object,
    reduce_scatter_rows,
)
from fastclip.distributed.runtime import Runtime, initialise, shutdown
from ranks import run_ranks


def _rows(runtime: Runtime, sizes: list[int]) -> Any:
    own = torch.full((sizes[runtime.rank], 2), float(runtime.rank + 1))
    gathered = all_gather_rows(own, sizes)
    weight = torch.arange(sum(sizes), dtype=torch.float32)[:, None].expand(-1, 2).contiguous()
    return gathered, reduce_scatter_rows(weight * (runtime.rank + 1), sizes)


@pytest.mark.parametrize("sizes", [[3], [2, 2], [1, 4, 0], [0, 0, 2, 1]])
def test_rows_travel_with_unequal_shares(tmp_path: Path, sizes: list[int]) -> None:
    results = run_ranks(_rows, len(sizes), tmp_path, sizes)
    whole = torch.cat([torch.full((n, 2), float(r + 1)) for r, n in enumerate(sizes)])
    ranks = sum(range(1, len(sizes) + 1))
    weight = torch.arange(sum(sizes), dtype=torch.float32)[:, None].expand(-1, 2) * ranks
    for (gathered, own), part in zip(results, weight.split(sizes), strict=True):
        assert torch.equal(gathered, whole)
        assert torch.equal(own, part)


def _sum(runtime: Runtime) -> Any:
    x = torch.tensor([1.0, 2.0]) * (runtime.rank + 1)
    x.requires_grad_()
    total = all_reduce_sum(x)
    ((runtime.rank + 1) * total.square()).sum().backward()
    return total.detach(), x.grad


def test_sum_over_ranks_is_differentiable(tmp_path: Path) -> None:
    for total, gradient in run_ranks(_sum, 3, tmp_path):
        assert total.tolist() == [6.0, 12.0]
        # d/dx of Σ_r (r+1)·total² over all ranks = 2·total·(1+2+3)
        assert gradient.tolist() == [72.0, 144.0]


def _values(runtime: Runtime) -> Any:
    return (
        all_gather_objects({"rank": runtime.rank}),
        broadcast_object(f"of {runtime.rank}"),
        any_rank(runtime.rank == 1),
        any_rank(False),
        all_gather_integers([runtime.rank, 7], torch.device("cpu")),
    )


def test_small_values(tmp_path: Path) -> None:
    for result in run_ranks(_values, 2, tmp_path):
        assert result == ([{"rank": 0}, {"rank": 1}], "of 0", True, False, [[0, 7], [1, 7]])


def test_without_a_group_everything_is_the_identity() -> None:
    x = torch.randn(3, 2)
    assert all_gather_rows(x, [3]) is x
    assert reduce_scatter_rows(x, [3]) is x
    assert all_reduce_sum(x) is x
    assert all_gather_objects(5) == [5]


def test_half_a_launcher_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"lacks LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        initialise("cpu")
    with pytest.raises(ValueError, match="device is auto, cpu or cuda"):
        initialise("gpu")


def test_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    runtime = initialise("cpu")
    try:
        assert (runtime.rank, runtime.world_size, runtime.backend) == (0, 1, "gloo")
        assert runtime.is_main
        assert any_rank(True)
    finally:
        shutdown()
