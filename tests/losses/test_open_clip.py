"""The modules take the place of open_clip's: same arguments, same values, same gradients."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenClipSigLipLoss
from torch import Tensor, nn

from fastclip.losses import ClipLoss, SigLipLoss, clip_loss, common, siglip_loss
from loss_oracles import error, features

PEERS = [(OpenClipLoss, ClipLoss), (OpenClipSigLipLoss, SigLipLoss)]


def _pair() -> tuple[Tensor, Tensor]:
    image, text = (x.float() for x in features(31, 20))
    return image, text


def _gradients(module: nn.Module, scale: float, bias: float | None) -> tuple[Tensor, ...]:
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    values = (*_pair(), torch.tensor(scale), None if bias is None else torch.tensor(bias))
    arguments = {
        name: value.clone().requires_grad_()
        for name, value in zip(names, values, strict=True)
        if value is not None
    }
    output = module(**arguments, output_dict=True)  # as open_clip's training loop calls it
    assert set(output) == {"contrastive_loss"}
    loss = output["contrastive_loss"]
    plain = module(**arguments)
    assert torch.equal(plain, loss)
    assert loss.shape == ()
    gradients = torch.autograd.grad(loss, tuple(arguments.values()), allow_unused=True)
    return (loss.detach(), *(g if g is not None else torch.zeros(()) for g in gradients))


@pytest.mark.parametrize("scale", [1.0, 14.285714, 100.0])
def test_clip_values_and_gradients(scale: float) -> None:
    theirs, ours = (_gradients(module(), scale, None) for module in (OpenClipLoss, ClipLoss))
    for a, b in zip(theirs, ours, strict=True):
        assert error(b, a) < 1e-4  # open_clip's fp32 is the noisier one


def test_a_bias_cancels_in_the_softmax() -> None:
    *theirs, their_bias = _gradients(OpenClipLoss(), 10.0, -4.0)
    *ours, our_bias = _gradients(ClipLoss(), 10.0, -4.0)
    for a, b in zip(theirs, ours, strict=True):
        assert error(b, a) < 1e-4
    assert abs(float(their_bias)) < 1e-6
    assert float(our_bias) == 0.0


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -12.0), (1.0, 0.0)])
def test_siglip_values_and_gradients(scale: float, bias: float) -> None:
    theirs, ours = (
        _gradients(module(), scale, bias) for module in (OpenClipSigLipLoss, SigLipLoss)
    )
    for a, b in zip(theirs, ours, strict=True):
        assert error(b, a) < 1e-4


@pytest.mark.parametrize(("theirs", "ours"), PEERS)
@pytest.mark.parametrize("method", ["__init__", "forward", "get_logits"])
def test_arguments_have_their_names_and_places(
    theirs: type[nn.Module], ours: type[nn.Module], method: str
) -> None:
    wanted, offered = (
        [
            (p.name, p.default is p.empty)
            for p in inspect.signature(getattr(module, method)).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        for module in (theirs, ours)
    )
    assert [name for name, _ in offered] == [name for name, _ in wanted]
    for (name, required), (_, they_require) in zip(offered, wanted, strict=True):
        assert they_require or not required, name


@pytest.mark.parametrize("bias", [None, -3.0])
def test_logits(bias: float | None) -> None:
    arguments = (*_pair(), torch.tensor(7.0), None if bias is None else torch.tensor(bias))
    for theirs, ours in PEERS:
        wanted: Any = theirs().get_logits(*arguments)
        logits: Any = ours().get_logits(*arguments)
        assert isinstance(logits, tuple) == isinstance(wanted, tuple)
        torch.testing.assert_close(logits, wanted)


def test_open_clips_arguments_on_one_process() -> None:
    image, text = _pair()
    module = ClipLoss(True, True, True, 0, 1, False)
    assert torch.equal(module(image, text, 10.0), clip_loss(image, text, 10.0))
    ids = torch.arange(31) // 3
    smooth = ClipLoss(label_smoothing=0.1)(image, text, 10.0, ids=ids)
    assert torch.equal(smooth, clip_loss(image, text, 10.0, ids=ids, label_smoothing=0.1))
    module = SigLipLoss(True, 0, 1, "shift")
    assert torch.equal(module(image, text, 10.0), siglip_loss(image, text, 10.0, 0.0))
    together = SigLipLoss()(image, text, 10.0, -3.0, ids=ids)
    assert torch.equal(together, siglip_loss(image, text, 10.0, -3.0, ids=ids))
    assert not list(ClipLoss().parameters())
    assert not ClipLoss().state_dict()


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_ranks_that_cannot_be(module: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="initialised before the loss"):
        module(rank=1, world_size=4)
    for index in (4, -1):
        with pytest.raises(ValueError, match=f"rank={index} is not one of world_size=4"):
            module(rank=index, world_size=4)
    with pytest.raises(ValueError, match="rank=None is not one of world_size=0"):
        module(world_size=0)
    with pytest.raises(ValueError, match="rank=1 was given without world_size"):
        module(rank=1)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use_horovod.*torch\.distributed only"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl is bidir, shift, reduce or gather, not 'ring'"):
        SigLipLoss(dist_impl="ring")
    for label_smoothing in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing is in \[0, 1\)"):
            ClipLoss(label_smoothing=label_smoothing)


def test_an_approximation_that_is_not_made_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(common, "_said", False)
    with caplog.at_level(logging.INFO, logger="fastclip"):
        ClipLoss()
        ClipLoss(gather_with_grad=False, rank=0, world_size=1)  # alone, there is nothing to say
        assert not caplog.records
        ClipLoss(gather_with_grad=False)
        ClipLoss(gather_with_grad=False)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "always carries the exact gradient" in caplog.text
