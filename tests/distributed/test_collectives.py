"""Collectives with unequal shares, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.distributed.collectives import (
    all_gather_integers,
    all_gather_objects,
    all_gather_rows,
    all_reduce_sum,
    any_rank,
    barrier,
    broadcast_object,
    rank,
    reduce_scatter_rows,
    world_size,
)
from fastclip.distributed.runtime import Runtime
from ranks import run_ranks

RANKS = 3
SIZES = [[2, 2, 2], [0, 0, 0], [1, 4, 0], [0, 0, 2], [3, 1, 1]]
SHAPES = (((2,), torch.float32), ((), torch.int64), ((3, 2), torch.bfloat16))


def _of_rank(size: int, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    first = torch.arange(size * torch.Size(shape).numel()).reshape(size, *shape)
    return (first + 10 * index).to(dtype)


def _weights(sizes: list[int], shape: tuple[int, ...]) -> Tensor:
    return _of_rank(sum(sizes), 0, shape, torch.float32)


def _rows(runtime: Runtime) -> list[tuple[Tensor, Tensor]]:
    results = []
    for sizes in SIZES:
        for shape, dtype in SHAPES:
            own = _of_rank(sizes[runtime.rank], runtime.rank, shape, dtype)
            strided = torch.stack((own, own), dim=-1)[..., 0]  # not contiguous
            part = reduce_scatter_rows(_weights(sizes, shape) * (runtime.rank + 1), sizes)
            results.append((all_gather_rows(strided, sizes), part))
    return results


def _report(runtime: Runtime) -> dict[str, Any]:
    index = runtime.rank
    rows = _rows(runtime)
    with pytest.raises((ValueError, RuntimeError)):  # shares that do not match the rows
        all_gather_rows(torch.zeros(3, 2), [2] * RANKS)
    with pytest.raises((ValueError, RuntimeError)):
        reduce_scatter_rows(torch.zeros(5, 2), [2, 1, 1])
    x = torch.tensor([1.0, 2.0]) * (index + 1)
    total = all_reduce_sum(x)
    barrier()
    return {
        "rows": rows,
        "total": total,
        "unchanged": torch.equal(x, torch.tensor([1.0, 2.0]) * (index + 1)),
        "strided": all_reduce_sum(torch.arange(6.0).view(2, 3).T),
        "place": (rank(), world_size()),
        "objects": all_gather_objects({"rank": index}),
        "broadcast": broadcast_object(f"of {index}"),
        "any": (any_rank(index == 1), any_rank(False)),
        "integers": all_gather_integers([index, 7], torch.device("cpu")),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_report, RANKS, tmp_path_factory.mktemp("ranks"))


def test_rows_travel_with_unequal_shares(results: list[dict[str, Any]]) -> None:
    by_rank = [result["rows"] for result in results]
    cases = [(sizes, *rest) for sizes in SIZES for rest in SHAPES]
    for (sizes, shape, dtype), *received in zip(cases, *by_rank, strict=True):
        whole = torch.cat([_of_rank(n, r, shape, dtype) for r, n in enumerate(sizes)])
        parts = (_weights(sizes, shape) * sum(range(1, RANKS + 1))).split(sizes)
        for (gathered, own), part in zip(received, parts, strict=True):
            assert gathered.dtype == dtype
            assert torch.equal(gathered, whole)
            assert torch.equal(own, part)


def test_sums_and_small_values(results: list[dict[str, Any]]) -> None:
    for index, result in enumerate(results):
        assert result["total"].tolist() == [6.0, 12.0]
        assert result["unchanged"]
        assert torch.equal(result["strided"], 3 * torch.arange(6.0).view(2, 3).T)
        assert result["place"] == (index, 3)
        assert result["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert result["broadcast"] == "of 0"
        assert result["any"] == (True, False)
        assert result["integers"] == [[0, 7], [1, 7], [2, 7]]


def test_without_a_group_everything_is_the_identity() -> None:
    x = torch.randn(3, 2)
    assert all_gather_rows(x, [3]) is x
    assert reduce_scatter_rows(x, [3]) is x
    assert all_reduce_sum(x) is x
    assert all_gather_objects(5) == [5]
    assert broadcast_object("here") == "here"
    assert all_gather_integers([1, 2], torch.device("cpu")) == [[1, 2]]
    assert (rank(), world_size(), any_rank(True), any_rank(False)) == (0, 1, True, False)
    barrier()
