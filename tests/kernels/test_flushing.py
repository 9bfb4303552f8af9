"""One exponential per entry, with denormals flushed to zero as a GPU does, at 65,536 columns.

The interpreter keeps denormals, so the kernels' arithmetic is written out here once more.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from fastclip.kernels.contrastive_kernels import FLOOR, HEADROOM, SMALL_SUM

ROWS, COLUMNS, TILE, SCALE = 64, 65_536, 128, 100.0
SMALLEST = 2.0**-126


def _flushed_exp(x: Tensor) -> Tensor:
    e = x.exp()
    return e.masked_fill(e < SMALLEST, 0.0)


def _logits(cosine: float, second: float | None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    cosines = cosine + 0.01 * torch.randn(ROWS, COLUMNS, generator=generator)
    if second is not None:  # a few near ones, all in one tile
        cosines[:, 300:305] += second - cosine
    return SCALE * cosines.clamp(-1, 1)


def _shift() -> float:
    bound = SCALE * 1.00002
    return max(0.0, bound // 1 - HEADROOM.value)


@pytest.mark.parametrize("second", [None, 0.9])
@pytest.mark.parametrize("cosine", [0.9, 0.3, 0.0, -0.3, -0.45, -0.5, -0.55, -0.6, -0.7, -0.8])
def test_sums_of_rows(cosine: float, second: float | None) -> None:
    logits = _logits(cosine, second)
    tiles = logits.view(ROWS, -1, TILE)
    fast = _flushed_exp(tiles - _shift()).sum(2)
    largest = tiles.amax(2)
    good = fast >= SMALL_SUM.value  # the kernels ask for a whole tile's rows and columns
    total = torch.where(good, fast, _flushed_exp(tiles - largest[:, :, None]).sum(2))
    shift = torch.where(good, torch.full_like(largest, _shift()), largest)
    found = (total.double().log() + shift.double()).logsumexp(1)
    assert float((found - logits.double().logsumexp(1)).abs().max()) < 5e-6
    # Both ways are taken somewhere, and the guard is needed: without it the sums are wrong.
    assert bool(good.any()) == (cosine > -0.25 or second is not None)
    assert bool(good.all()) == (cosine > -0.15)
    if cosine <= -0.6 and second is None:
        unguarded = fast.double().sum(1).log() + _shift()
        assert float((unguarded - logits.double().logsumexp(1)).abs().max()) > 1e-3


@pytest.mark.parametrize("cosine", [0.9, 0.3, 0.0, -0.2, -0.3, -0.35])
def test_gradients_from_kept_exponentials(cosine: float) -> None:
    """Where the log-sum-exps allow it, e^S times a factor is the softmax to fp32's last digits."""
    logits = _logits(cosine, None)
    others = logits.double().logsumexp(1)
    usable = others >= _shift() + FLOOR.value
    assert bool(usable.all()) == (cosine > -0.32)
    kept = _flushed_exp(logits - _shift())
    softmax = kept.double() * (_shift() - others).exp()[:, None]
    wrong = (softmax - (logits.double() - others[:, None]).exp()).abs().sum(1)
    assert float(wrong[usable].max() if usable.any() else 0.0) < 5e-6
    factor = (_shift() - others).float().exp()
    assert bool((factor[usable] >= SMALLEST).all())
    assert bool(factor[usable].isfinite().all())
