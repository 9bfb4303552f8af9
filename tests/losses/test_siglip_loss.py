"""`siglip_loss` against the fp64 definition, on one process."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import SigLipLoss as OpenClipSigLipLoss
from torch import Tensor

from fastclip.kernels import reference
from fastclip.kernels.reference import compute_dtype
from fastclip.losses import SigLipLoss, siglip_loss, siglip_loss_and_grads
from loss_oracles import error, features, siglip_expected


def _run(
    image: Tensor,
    text: Tensor,
    scale: float,
    bias: float,
    dtype: torch.dtype = torch.float32,
    **options,
) -> tuple[Tensor, ...]:
    x = image.to(dtype).requires_grad_()
    y = text.to(dtype).requires_grad_()
    s = torch.tensor(scale, dtype=compute_dtype(dtype), requires_grad=True)
    b = torch.tensor([bias], dtype=compute_dtype(dtype), requires_grad=True)
    loss = siglip_loss(x, y, s, b, **options)
    loss.backward()
    assert x.grad is not None
    assert y.grad is not None
    assert s.grad is not None
    assert b.grad is not None
    assert b.grad.shape == (1,)
    return loss.detach(), x.grad, y.grad, s.grad, b.grad[0]


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -12.5)])
@pytest.mark.parametrize(("pairs", "dims"), [(1, 5), (2, 1), (33, 17), (130, 64)])
def test_fp32_equals_the_definition(pairs: int, dims: int, scale: float, bias: float) -> None:
    image, text = (x.float() for x in features(pairs, dims))
    expected = siglip_expected(image, text, scale, bias)
    largest = max(float(x.norm()) for x in expected[1:] if x is not None)
    for value, wanted in zip(_run(image, text, scale, bias), expected, strict=True):
        assert wanted is not None
        assert error(value, wanted, floor=1e-3 * largest) < 2e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_costs_the_rounding_of_the_result_only(
    dtype: torch.dtype, tolerance: float
) -> None:
    image, text = (x.to(dtype) for x in features(65, 48))
    expected = siglip_expected(image, text, 10.0, -10.0)
    for value, wanted in zip(_run(image, text, 10.0, -10.0, dtype), expected, strict=True):
        assert wanted is not None
        assert error(value, wanted) < tolerance


def test_several_positives() -> None:
    image, text = features(40, 12)
    ids = torch.arange(40) % 7
    expected = siglip_expected(image, text, 10.0, -5.0, ids)
    for value, wanted in zip(
        _run(image, text, 10.0, -5.0, torch.float64, ids=ids), expected, strict=True
    ):
        assert wanted is not None
        assert error(value, wanted) < 1e-11


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = features(33, 10)
    whole = _run(image, text, 10.0, -3.0, torch.float64)
    for function in ("sigmoid_loss", "sigmoid_gradients"):
        defaults = getattr(reference, function).__kwdefaults__
        monkeypatch.setitem(defaults, "chunk_elements", 70)
    for a, b in zip(whole, _run(image, text, 10.0, -3.0, torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def test_gradcheck_and_no_second_derivative() -> None:
    image, text = (x.requires_grad_() for x in features(6, 3))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(siglip_loss, (image, text, scale, bias))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(siglip_loss(image, text, scale, bias), image, create_graph=True)


def test_autocast_changes_nothing() -> None:
    image, text = (x.float() for x in features(24, 16))
    plain = _run(image, text, 10.0, -10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _run(image, text, 10.0, -10.0)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


def test_loss_and_gradients_without_autograd() -> None:
    image, text = (x.float() for x in features(19, 8))
    ids = torch.arange(19) // 3
    result = _run(image, text, 10.0, -4.0, ids=ids)
    value, gradients = siglip_loss_and_grads(
        image, text, torch.tensor(10.0), torch.tensor(-4.0), ids=ids
    )
    assert torch.equal(value, result[0])
    for a, b in zip(gradients, result[1:], strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


def test_module_equals_open_clips() -> None:
    image, text = (x.float() for x in features(31, 20))
    results = []
    for module in (OpenClipSigLipLoss(), SigLipLoss()):
        x, y = image.clone().requires_grad_(), text.clone().requires_grad_()
        s = torch.tensor(10.0, requires_grad=True)
        b = torch.tensor(-10.0, requires_grad=True)
        output = module(x, y, s, b, output_dict=True)
        assert set(output) == {"contrastive_loss"}
        output["contrastive_loss"].backward()
        results.append((output["contrastive_loss"].detach(), x.grad, y.grad, s.grad, b.grad))
    for theirs, ours in zip(*results, strict=True):
        assert error(ours, theirs) < 1e-4


def test_module_arguments() -> None:
    with pytest.raises(ValueError, match="dist_impl"):
        SigLipLoss(dist_impl="ring")
    image, text = (x.float() for x in features(5, 4))
    module = SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="shift")
    assert float(module(image, text, 10.0)) == float(siglip_loss(image, text, 10.0, 0.0))
    logits = module.get_logits(image, text, torch.tensor(2.0), torch.tensor(1.0))
    torch.testing.assert_close(logits, 2 * image @ text.T + 1)


def test_bias_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"logit_bias is one number.*\[2\]"):
        siglip_loss(torch.zeros(2, 4), torch.zeros(2, 4), 1.0, torch.ones(2))
