"""The exhaustive search against a stable sort, whatever the parts and their sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastclip.search import exact as module
from fastclip.search.exact import search_exact


def _parts(dtype: torch.dtype, sizes: tuple[int, ...] = (100, 3, 0, 257, 1)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        F.normalize(torch.randn(n, 24, generator=generator), dim=1).to(dtype) for n in sizes
    ]  # fmt: skip


def _queries(rows: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 24, generator=torch.Generator().manual_seed(6)), dim=1)


@pytest.fixture(autouse=True, params=[1, 8 << 20])
def _block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", request.param)
    monkeypatch.setattr(module, "_MOST_SCORES", request.param)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("k", [1, 10, 361, 1000])
def test_equals_a_stable_sort(dtype: torch.dtype, rows: int, k: int) -> None:
    parts, queries = _parts(dtype), _queries(rows)
    scores, numbers = search_exact(parts, queries, k)
    whole = queries @ torch.cat(parts).float().T
    expected, order = whole.sort(dim=1, descending=True, stable=True)
    assert numbers.shape == (rows, min(k, 361))
    torch.testing.assert_close(scores, expected[:, :k])
    torch.testing.assert_close(whole.gather(1, numbers), expected[:, :k])
    assert torch.equal(numbers, order[:, :k])


def test_equal_ones_by_their_numbers() -> None:
    parts = [torch.eye(4)[[0, 1, 0]], torch.eye(4)[[0, 2, 0, 1]]]
    scores, numbers = search_exact(parts, torch.eye(4)[:2], 6)
    assert numbers.tolist() == [[0, 2, 3, 5, 1, 4], [1, 6, 0, 2, 3, 4]]
    assert scores.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]


def test_chosen_rows_alone() -> None:
    parts, queries = _parts(torch.float16), _queries(3)
    generator = torch.Generator().manual_seed(7)
    masks = [torch.rand(len(part), generator=generator) < 0.3 for part in parts]
    chosen = [mask.nonzero()[:, 0] for mask in masks]
    _, numbers = search_exact(parts, queries, 20, chosen)
    whole = queries @ torch.cat(parts).float().T
    order = whole.masked_fill(~torch.cat(masks), -2).sort(descending=True, stable=True).indices
    assert torch.equal(numbers, order[:, :20])
    nothing = [torch.empty(0, dtype=torch.int64) for _ in parts]
    assert search_exact(parts, queries, 20, nothing)[1].shape == (3, 0)
