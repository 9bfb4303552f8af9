"""The losses on 1 to 4 ranks equal one process on the concatenated batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.distributed.runtime import Runtime
from fastclip.losses import ClipLoss, clip_loss, clip_loss_and_grads, siglip_loss
from loss_oracles import clip_expected, error, features, siglip_expected
from ranks import run_ranks

SIZES = {1: (9,), 2: (7, 7), 3: (5, 1, 9), 4: (4, 0, 6, 1)}
DIMS, SCALE, BIAS = 11, 30.0, -6.0


def _share(x: Tensor, runtime: Runtime, sizes: tuple[int, ...]) -> Tensor:
    return x.split(list(sizes))[runtime.rank].clone()


def _softmax(runtime: Runtime, sizes: tuple[int, ...], several: bool) -> Any:
    image, text = (x.float() for x in features(sum(sizes), DIMS))
    ids = torch.arange(sum(sizes)) % 4 if several else None
    x, y = (_share(each, runtime, sizes).requires_grad_() for each in (image, text))
    own_ids = None if ids is None else _share(ids, runtime, sizes)
    s = torch.tensor([SCALE], requires_grad=True)
    smoothing = 0.1 if several else 0.0
    loss = clip_loss(x, y, s, ids=own_ids, label_smoothing=smoothing)
    loss.backward()
    value, gradients = clip_loss_and_grads(
        x.detach(), y.detach(), s.detach(), ids=own_ids, label_smoothing=smoothing
    )
    assert torch.equal(value, loss.detach())
    torch.testing.assert_close(gradients.d_image_features, x.grad)
    return loss.detach(), x.grad, y.grad, s.grad


def _sigmoid(runtime: Runtime, sizes: tuple[int, ...], several: bool) -> Any:
    image, text = (x.float() for x in features(sum(sizes), DIMS))
    ids = torch.arange(sum(sizes)) % 4 if several else None
    x, y = (_share(each, runtime, sizes).requires_grad_() for each in (image, text))
    own_ids = None if ids is None else _share(ids, runtime, sizes)
    s = torch.tensor(SCALE, requires_grad=True)
    b = torch.tensor(BIAS, requires_grad=True)
    loss = siglip_loss(x, y, s, b, ids=own_ids)
    loss.backward()
    return loss.detach(), x.grad, y.grad, s.grad, b.grad


@pytest.mark.parametrize("several", [False, True], ids=["one-positive", "several-positives"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_ranks_equal_one_process(tmp_path: Path, world_size: int, several: bool, kind: str) -> None:
    sizes = SIZES[world_size]
    image, text = (x.float() for x in features(sum(sizes), DIMS))
    ids = torch.arange(sum(sizes)) % 4 if several else None
    if kind == "softmax":
        expected = clip_expected(image, text, SCALE, ids, 0.1 if several else 0.0)
        results = run_ranks(_softmax, world_size, tmp_path, sizes, several)
    else:
        expected = siglip_expected(image, text, SCALE, BIAS, ids)
        results = run_ranks(_sigmoid, world_size, tmp_path, sizes, several)
    for result in results:
        assert torch.equal(result[0], results[0][0])  # the same value everywhere
    assert error(results[0][0], expected.loss) < 1e-6
    # Feature gradients are W times the global loss's, so that averaging over ranks is exact.
    d_image = torch.cat([result[1] for result in results]) / world_size
    d_text = torch.cat([result[2] for result in results]) / world_size
    assert error(d_image, expected.d_image) < 1e-5
    assert error(d_text, expected.d_text) < 1e-5
    for result in results:  # the scalars' are global on every rank
        assert error(result[3].reshape(()), expected.d_scale) < 1e-5
        if kind == "sigmoid":
            assert expected.d_bias is not None
            assert error(result[4], expected.d_bias) < 1e-5


def _local(runtime: Runtime) -> Any:
    image, text = (x.float() for x in features(12, DIMS))
    x, y = (_share(each, runtime, (6, 6)) for each in (image, text))
    alone = ClipLoss(rank=0, world_size=1)(x, y, SCALE)
    together = ClipLoss(rank=runtime.rank, world_size=2)(x, y, SCALE)
    return alone, together


def test_world_size_one_keeps_the_loss_on_the_rank(tmp_path: Path) -> None:
    image, text = (x.float() for x in features(12, DIMS))
    results = run_ranks(_local, 2, tmp_path)
    for rank, (alone, together) in enumerate(results):
        half = slice(6 * rank, 6 * rank + 6)
        assert error(alone, clip_expected(image[half], text[half], SCALE).loss) < 1e-6
        assert error(together, clip_expected(image, text, SCALE).loss) < 1e-6


def _disagree(runtime: Runtime, case: str) -> str:
    x, y, ids = torch.zeros(3, 4), torch.zeros(3, 4), None
    if runtime.rank == 1:
        if case == "dims":
            x, y = torch.zeros(3, 5), torch.zeros(3, 5)
        elif case == "ids":
            ids = torch.zeros(3, dtype=torch.int64)
        elif case == "dtype":
            x, y = x.half(), y.half()
        else:
            x = x[:2]
    with pytest.raises((ValueError, TypeError)) as caught:
        clip_loss(x, y, 1.0, ids=ids)
    return str(caught.value)


@pytest.mark.parametrize("case", ["dims", "ids", "dtype", "broken"])
def test_ranks_that_disagree_all_hear_of_it(tmp_path: Path, case: str) -> None:
    first, second = run_ranks(_disagree, 2, tmp_path, case)
    if case == "broken":
        assert "rank 1 got features that the loss refuses" in first
        assert "row by row" in second
    else:
        assert first == second
        assert "rank 1" in first


def _wrong_arguments(runtime: Runtime) -> str:
    with pytest.raises(ValueError, match="do not describe this process") as caught:
        ClipLoss(rank=1 - runtime.rank, world_size=2)
    return str(caught.value)


def test_arguments_that_contradict_the_group(tmp_path: Path) -> None:
    for rank, message in enumerate(run_ranks(_wrong_arguments, 2, tmp_path)):
        assert f"it is rank {rank} of 2" in message
