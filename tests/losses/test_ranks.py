"""The losses on 1 to 4 ranks equal one process on the concatenated batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclip.distributed.runtime import Runtime
from fastclip.losses import (
    ClipLoss,
    SigLipLoss,
    clip_loss,
    clip_loss_and_grads,
    common,
    siglip_loss,
    siglip_loss_and_grads,
)
from loss_oracles import clip_expected, error, features, siglip_expected
from ranks import run_ranks

SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(9,)],
    2: [(7, 7), (1, 12), (0, 1)],
    3: [(6, 6, 6), (5, 1, 9)],
    4: [(3, 3, 3, 3), (4, 0, 6, 1)],
}
DIMS, SCALE, BIAS = 11, 30.0, -6.0
Case = tuple[str, tuple[int, ...], bool, torch.dtype, bool]
Worlds = Callable[[int], list[Any]]


def _cases(world_size: int) -> list[Case]:
    kinds = ("softmax", "sigmoid")
    cases: list[Case] = list(
        itertools.product(kinds, SIZES[world_size], (False, True), (torch.float32,), (False, True))
    )
    return cases + [(kind, SIZES[world_size][-1], False, torch.bfloat16, False) for kind in kinds]


def _batch(case: Case) -> tuple[Tensor, Tensor, Tensor | None, float]:
    _, sizes, several, dtype, _ = case
    image, text = (x.to(dtype) for x in features(sum(sizes), DIMS))
    if several:
        image, text = image * 3, text / 7
    ids = torch.arange(sum(sizes)) % 4 if several else None
    return image, text, ids, 0.1 if several else 0.0


def _share(x: Tensor, runtime: Runtime, sizes: tuple[int, ...]) -> Tensor:
    return x.split(list(sizes))[runtime.rank].clone()


def _run(runtime: Runtime) -> list[tuple[Tensor, ...]]:
    """Per case: the loss, and gradients of the features, the scale and the bias."""
    results = []
    for case in _cases(runtime.world_size):
        image, text, ids, smoothing = _batch(case)
        kind, sizes = case[:2]
        x, y = (_share(each, runtime, sizes).requires_grad_() for each in (image, text))
        options: dict[str, Any] = {"ids": None if ids is None else _share(ids, runtime, sizes)}
        # Several positives with raw features, so that every part of the loss crosses the ranks.
        options |= {"ring": case[4], "normalize": case[2]}
        s = torch.tensor([SCALE], requires_grad=True)
        b = torch.tensor(BIAS, requires_grad=True)
        leaves = (x, y, s) if kind == "softmax" else (x, y, s, b)
        if kind == "softmax":
            options["label_smoothing"] = smoothing
        function = clip_loss if kind == "softmax" else siglip_loss
        at_once = clip_loss_and_grads if kind == "softmax" else siglip_loss_and_grads
        loss = function(*leaves, **options)
        loss.backward()
        inputs = [leaf.detach() for leaf in leaves]
        value, gradients = at_once(*inputs, **options)
        assert torch.equal(value, loss.detach())
        if len(set(sizes)) == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(common, "all_gather_integers", _not_compared)
                again, same = at_once(*inputs, ranks_alike=True, **options)
                function(*leaves, ranks_alike=True, **options)
            assert torch.equal(again, value)
            for one, other in zip(same, gradients, strict=True):
                assert one is other or torch.equal(one, other)  # pyright: ignore[reportArgumentType]
        for leaf, gradient in zip(leaves, gradients, strict=False):
            torch.testing.assert_close(gradient, leaf.grad)
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    return results


def _not_compared(*arguments: Any) -> Any:
    raise AssertionError("ranks compare although they are alike")


def _in_groups(runtime: Runtime) -> Any:
    """Ranks 0 and 2 contrast among themselves; rank 1 is not asked, and asking is an error."""
    image, text = (x.float() for x in features(12, DIMS))
    x, y = (_share(each, runtime, (6, 2, 4)).requires_grad_() for each in (image, text))
    group: Any = dist.new_group([0, 2])
    if runtime.rank == 1:
        with pytest.raises(ValueError, match="not in the loss's group"):
            clip_loss(x, y, SCALE, group=group)
        return None
    loss: Any = ClipLoss(group=group)(x, y, SCALE)
    loss.backward()
    return loss.detach(), x.grad, y.grad


def _refused(x: Tensor, y: Tensor, ids: Tensor | None) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        clip_loss(x, y, 1.0, ids=ids)
    return str(caught.value)


def _two_ranks(runtime: Runtime) -> dict[str, Any]:
    image, text = (_share(x.float(), runtime, (6, 6)) for x in features(12, DIMS))
    report: dict[str, Any] = {}
    for name, module in (("softmax", ClipLoss), ("sigmoid", SigLipLoss)):
        x = image.clone().requires_grad_()
        alone: Any = module(rank=0, world_size=1)(x, text, SCALE)
        alone.backward()
        together = module(rank=runtime.rank, world_size=2)(image, text, SCALE)
        report[name] = (alone.detach(), x.grad, together, module()(image, text, SCALE))
    with pytest.raises(ValueError, match="do not describe this process") as caught:
        ClipLoss(rank=1 - runtime.rank, world_size=2)
    report["wrong rank"] = str(caught.value)
    with pytest.raises(ValueError, match="contradicts a group of 2 ranks"):
        SigLipLoss(world_size=1, group=dist.group.WORLD)
    # Every rank hears of every mistake, and all are ready for the next call.
    x, ids, other = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), runtime.rank == 1
    wide = torch.zeros(3, 5) if other else x
    half = x.half() if other else x
    report["dims"] = _refused(wide, wide, None)
    report["ids"] = _refused(x, x, ids if other else None)
    report["dtype"] = _refused(half, half, None)
    report["broken"] = _refused(x[:2] if other else x, x, None)
    with pytest.raises(ValueError, match="other options") as caught:
        clip_loss(x, x, 1.0, ring=other)
    report["options"] = str(caught.value)
    report["nobody"] = _refused(x[:0], x[:0], None)
    return report


def _world(runtime: Runtime) -> tuple[Any, Any]:
    special = {2: _two_ranks, 3: _in_groups}.get(runtime.world_size)
    return _run(runtime), special(runtime) if special else None


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """What every rank of a world size has to report; each world starts once."""

    @functools.cache
    def run(world_size: int) -> list[Any]:
        if world_size == 1:
            cpu = torch.device("cpu")
            one = Runtime(rank=0, local_rank=0, world_size=1, device=cpu, backend="gloo")
            return [_world(one)]
        return run_ranks(_world, world_size, tmp_path_factory.mktemp("ranks"))

    return run


def _through_normalize(x: Tensor, gradient: Tensor) -> Tensor:
    leaf = x.double().requires_grad_()
    F.normalize(leaf).backward(gradient)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_equal_one_process(results_of: Worlds, world_size: int) -> None:
    by_rank = [results for results, _ in results_of(world_size)]
    for case, *results in zip(_cases(world_size), *by_rank, strict=True):
        image, text, ids, smoothing = _batch(case)
        unit = (image, text)
        if case[2]:
            unit = (F.normalize(image.double()), F.normalize(text.double()))
        if case[0] == "softmax":
            expected = clip_expected(*unit, SCALE, ids, smoothing)
        else:
            expected = siglip_expected(*unit, SCALE, BIAS, ids)
        if case[2]:
            expected = expected._replace(
                d_image=_through_normalize(image, expected.d_image),
                d_text=_through_normalize(text, expected.d_text),
            )
        for result in results:
            assert torch.equal(result[0], results[0][0]), case  # the same value everywhere
        # e^−logit of one pair: the logit's rounding, once more for the length's.
        close = 5e-6 if case[2] else 1e-6
        assert error(results[0][0], expected.loss, floor=1e-12) < close, case
        tolerance = 1e-5 if case[3] == torch.float32 else 4e-3
        # Feature gradients are W times the global loss's, so that averaging over ranks is exact.
        for index, wanted in ((1, expected.d_image), (2, expected.d_text)):
            own = torch.cat([result[index] for result in results])
            assert own.dtype == case[3]
            assert error(own / world_size, wanted, floor=1e-12) < tolerance, case
        for result in results:  # the scalars' are global on every rank
            assert torch.equal(result[3], results[0][3])
            assert error(result[3].reshape(()), expected.d_scale, floor=1e-12) < 1e-5, case
            if expected.d_bias is not None:
                assert error(result[4], expected.d_bias) < 1e-5, case


def test_a_group_of_some_ranks(results_of: Worlds) -> None:
    image, text = (x.float() for x in features(12, DIMS))
    members = torch.tensor([0, 1, 2, 3, 4, 5, 8, 9, 10, 11])
    expected = clip_expected(image[members], text[members], SCALE)
    first, nobody, last = (special for _, special in results_of(3))
    assert nobody is None
    assert error(first[0], expected.loss) < 1e-6
    assert error(torch.cat((first[1], last[1])) / 2, expected.d_image) < 1e-5
    assert error(torch.cat((first[2], last[2])) / 2, expected.d_text) < 1e-5


def test_two_ranks_with_arguments_right_and_wrong(results_of: Worlds) -> None:
    image, text = (x.float() for x in features(12, DIMS))
    reports = [special for _, special in results_of(2)]
    whole = {
        "softmax": clip_expected(image, text, SCALE).loss,
        "sigmoid": siglip_expected(image, text, SCALE, 0.0).loss,
    }
    for rank, report in enumerate(reports):
        own = slice(6 * rank, 6 * rank + 6)
        local = {
            "softmax": clip_expected(image[own], text[own], SCALE),
            "sigmoid": siglip_expected(image[own], text[own], SCALE, 0.0),
        }
        for kind, wanted in local.items():
            alone, d_image, together, default = report[kind]
            assert error(alone, wanted.loss) < 1e-6
            assert error(d_image, wanted.d_image) < 1e-5  # not times two: nothing is averaged
            assert error(together, whole[kind]) < 1e-6
            assert torch.equal(default, together)
        assert f"it is rank {rank} of 2" in report["wrong rank"]
        assert "at least one pair" in report["nobody"]
    first, second = reports
    for case in ("dims", "ids", "dtype", "options"):
        assert first[case] == second[case]
        assert "rank 1" in first[case]
    assert "rank 1 got features that the loss refuses" in first["broken"]
    assert "row by row" in second["broken"]
