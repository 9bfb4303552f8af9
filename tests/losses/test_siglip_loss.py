"""`siglip_loss` against the fp64 definition, on one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.kernels import reference
from fastclip.kernels.reference import compute_dtype
from fastclip.losses import siglip_loss, siglip_loss_and_grads
from loss_oracles import error, features, siglip_expected


def _run(
    image: Tensor,
    text: Tensor,
    scale: float,
    bias: float,
    dtype: torch.dtype = torch.float32,
    **options,
) -> tuple[Tensor, ...]:
    x = image.detach().clone().to(dtype).requires_grad_()
    y = text.detach().clone().to(dtype).requires_grad_()
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
@pytest.mark.parametrize(("pairs", "dims"), [(1, 5), (2, 1), (3, 7), (7, 9), (33, 17), (130, 63)])
def test_fp32_equals_the_definition(pairs: int, dims: int, scale: float, bias: float) -> None:
    image, text = (x.float() for x in features(pairs, dims))
    expected = siglip_expected(image, text, scale, bias)
    largest = max(float(x.norm()) for x in expected[1:] if x is not None)
    for value, wanted in zip(_run(image, text, scale, bias), expected, strict=True):
        assert wanted is not None
        assert error(value, wanted, floor=1e-3 * largest) < 2e-5


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
    for function in ("sigmoid_loss", "sigmoid_products"):
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


def test_autocast_multiplies_in_its_dtype() -> None:
    image, text = (x.float() for x in features(24, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _run(image, text, 10.0, -10.0)
    assert inside[1].dtype == torch.float32
    expected = siglip_expected(image.bfloat16(), text.bfloat16(), 10.0, -10.0)
    for value, wanted in zip(inside, expected, strict=True):
        assert wanted is not None
        assert error(value, wanted) < (1e-6 if value.ndim == 0 else 3e-3)


def test_normalizing_in_the_loss_equals_normalizing_before() -> None:
    image, text = features(24, 16)
    results = []
    for inside in (True, False):
        x, y = (image * 5).requires_grad_(), (text / 9).requires_grad_()
        a, b = (x, y) if inside else (F.normalize(x, dim=1), F.normalize(y, dim=1))
        loss = siglip_loss(a, b, 10.0, -4.0, normalize=inside)
        loss.backward()
        results.append((loss.detach(), x.grad, y.grad))
    for value, wanted in zip(*results, strict=True):
        torch.testing.assert_close(value, wanted)


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


def test_bias_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"logit_bias is one number.*\[2\]"):
        siglip_loss(torch.zeros(2, 4), torch.zeros(2, 4), 1.0, torch.ones(2))


def test_a_number_is_as_good_as_a_tensor() -> None:
    image, text = features(20, 9)
    expected = siglip_expected(image, text, 14.285714, -10.1)
    assert error(siglip_loss(image, text, 14.285714, -10.1), expected.loss) < 1e-12


def test_logits_beyond_every_exponential() -> None:
    image, text = (x.float() for x in features(12, 8))
    expected = siglip_expected(image, text, torch.tensor(1e30).item(), -10.0)
    loss, *gradients = _run(image, text, 1e30, -10.0)
    assert error(loss, expected.loss) < 1e-5
    for value in gradients:
        assert torch.isfinite(value).all()


def test_order_of_pairs_and_of_towers() -> None:
    image, text = features(23, 8, noise=0.5)
    order = torch.randperm(23)
    loss, d_image, d_text, *scalars = _run(image, text, 10.0, -5.0, torch.float64)
    moved = _run(image[order], text[order], 10.0, -5.0, torch.float64)
    swapped = _run(text, image, 10.0, -5.0, torch.float64)
    for value, wanted in zip(moved, (loss, d_image[order], d_text[order], *scalars), strict=True):
        torch.testing.assert_close(value, wanted)
    for value, wanted in zip(swapped, (loss, d_text, d_image, *scalars), strict=True):
        torch.testing.assert_close(value, wanted)
    assert float(siglip_loss(image, text.roll(1, 0), 10.0, -5.0)) > float(loss) + 1.0


@pytest.mark.parametrize("changed", ["features", "ids"])
def test_tensors_changed_in_place_are_refused(changed: str) -> None:
    image, text = (x.float() for x in features(8, 4))
    held, ids = image.requires_grad_() * 1, torch.arange(8) // 2
    loss = siglip_loss(held, text, 10.0, -5.0, ids=ids)
    with torch.no_grad():
        held.mul_(2) if changed == "features" else ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_not_a_number_stays_one() -> None:
    image, text = features(6, 4)
    image[3, 2] = math.nan
    assert math.isnan(siglip_loss(image, text, 1.0, 0.0))
    assert math.isnan(siglip_loss(text, text, 1.0, math.nan))


def test_input_that_does_not_fit() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"row by row.*\[3, 4\].*\[2, 4\]"):
        siglip_loss(x, x[:2], 1.0, 0.0)
    with pytest.raises(TypeError, match="one dtype"):
        siglip_loss(x, x.half(), 1.0, 0.0)
    with pytest.raises(ValueError, match="at least one pair"):
        siglip_loss(x[:0], x[:0], 1.0, 0.0)
    with pytest.raises(ValueError, match=r"ids are int64 \[3\]"):
        siglip_loss(x, x, 1.0, 0.0, ids=torch.zeros(2, dtype=torch.int64))
