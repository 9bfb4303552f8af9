"""`clip_loss` against the fp64 definition, on one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.kernels import reference
from fastclip.kernels.reference import compute_dtype
from fastclip.losses import ClipLoss, clip_loss, clip_loss_and_grads
from loss_oracles import clip_expected, error, features

SCALES = (1.0, 14.285714, 100.0)


def _run(
    image: Tensor, text: Tensor, scale: float, dtype: torch.dtype = torch.float32, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = image.detach().clone().to(dtype).requires_grad_()
    y = text.detach().clone().to(dtype).requires_grad_()
    s = torch.tensor([scale], dtype=compute_dtype(dtype), requires_grad=True)
    loss = clip_loss(x, y, s, **options)
    loss.backward()
    assert x.grad is not None
    assert y.grad is not None
    assert s.grad is not None
    assert x.grad.dtype == y.grad.dtype == dtype
    assert s.grad.shape == (1,)
    return loss.detach(), x.grad, y.grad, s.grad[0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("pairs", "dims"), [(1, 5), (2, 1), (3, 7), (7, 9), (33, 17), (130, 63)])
def test_fp32_equals_the_definition(pairs: int, dims: int, scale: float) -> None:
    image, text = features(pairs, dims)
    image, text = image.float(), text.float()
    expected = clip_expected(image, text, scale)
    loss, d_image, d_text, d_scale = _run(image, text, scale)
    # A loss near 0 is a difference of logits, which fp32 knows to 1e-7 of their size.
    assert abs(float(loss - expected.loss)) <= 1e-5 * max(0.05, float(expected.loss))
    if pairs == 1:
        assert float(loss) == 0.0
        assert not d_image.any()
        assert not d_text.any()
        assert not d_scale.any()
        return
    assert error(d_image, expected.d_image) < 2e-5
    assert error(d_text, expected.d_text) < 2e-5
    assert error(d_scale, expected.d_scale, floor=1e-4) < 2e-5


@pytest.mark.parametrize("scale", SCALES)
def test_fp64_is_fp64(scale: float) -> None:
    image, text = features(21, 9)
    expected = clip_expected(image, text, scale)
    loss, d_image, d_text, _ = _run(image, text, scale, torch.float64)
    assert loss.dtype == torch.float64
    assert error(loss, expected.loss) < 1e-12
    assert error(d_image, expected.d_image) < 1e-12
    assert error(d_text, expected.d_text) < 1e-12


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("several", [False, True])
def test_several_positives_and_smoothing(label_smoothing: float, several: bool) -> None:
    image, text = features(40, 12)
    ids = torch.arange(40) % 7 if several else None
    expected = clip_expected(image, text, 20.0, ids, label_smoothing)
    result = _run(image, text, 20.0, torch.float64, ids=ids, label_smoothing=label_smoothing)
    for value, reference_value in zip(result, expected[:4], strict=True):
        assert error(value, reference_value) < 1e-11


def test_distinct_ids_are_the_plain_loss() -> None:
    image, text = features(17, 6)
    plain = _run(image, text, 30.0)
    with_ids = _run(image, text, 30.0, ids=torch.randperm(17) - 5)
    for a, b in zip(plain, with_ids, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_all_pairs_of_one_id() -> None:
    image, text = features(9, 5)
    ids = torch.zeros(9, dtype=torch.int64)
    expected = clip_expected(image, text, 10.0, ids)
    for value, wanted in zip(
        _run(image, text, 10.0, torch.float64, ids=ids), expected[:4], strict=True
    ):
        assert error(value, wanted) < 1e-11


@pytest.mark.parametrize("chunk_elements", [1, 100, 131])
def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    image, text = features(33, 10)
    whole = _run(image, text, 50.0, torch.float64, ids=torch.arange(33) // 2)
    for function in ("contrastive_statistics", "contrastive_products"):
        defaults = getattr(reference, function).__kwdefaults__
        monkeypatch.setitem(defaults, "chunk_elements", chunk_elements)
    parts = _run(image, text, 50.0, torch.float64, ids=torch.arange(33) // 2)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1e3, 1e15])
def test_features_that_are_not_normalised_stay_finite(size: float) -> None:
    image, text = features(12, 4)
    loss, d_image, d_text, d_scale = _run(image * size, text * size, 1.0)
    for value in (loss, d_image, d_text, d_scale):
        assert torch.isfinite(value).all()
    expected = clip_expected((image * size).float(), (text * size).float(), 1.0)
    assert error(loss, expected.loss) < 1e-5


def test_converged_pairs_keep_their_digits() -> None:
    """The loss of a batch that is right by far is tiny, and still correct to seven digits."""
    image = torch.eye(6)
    loss, _, _, d_scale = _run(image, image, 40.0)
    others = 5 * math.exp(-40.0)
    assert float(loss) == pytest.approx(math.log1p(others), rel=1e-6)
    assert float(d_scale) == pytest.approx(-others / (1 + others), rel=1e-6)


def test_gradcheck_and_no_second_derivative() -> None:
    image, text = (x.requires_grad_() for x in features(7, 3))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 1, 2, 3, 3, 3])
    assert torch.autograd.gradcheck(
        lambda *a: clip_loss(*a, ids=ids, label_smoothing=0.2), (image, text, scale)
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(clip_loss(image, text, scale), image, create_graph=True)


def test_frozen_tower_and_upstream_gradient() -> None:
    image, text = (x.float() for x in features(8, 4))
    y = text.clone().requires_grad_()
    (3 * clip_loss(image, y, 10.0)).backward()
    expected = clip_expected(image, text, 10.0)
    assert y.grad is not None
    assert error(y.grad, 3 * expected.d_text) < 1e-5


@pytest.mark.parametrize("changed", ["features", "ids"])
def test_tensors_changed_in_place_are_refused(changed: str) -> None:
    image, text = (x.float() for x in features(8, 4))
    held, ids = image.requires_grad_() * 1, torch.arange(8) // 2
    loss = clip_loss(held, text, 10.0, ids=ids)
    with torch.no_grad():
        held.mul_(2) if changed == "features" else ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_in_its_dtype(dtype: torch.dtype) -> None:
    image, text = (x.float() for x in features(24, 16))
    with torch.autocast("cpu", dtype=dtype):
        inside = _run(image, text, 100.0)
    assert inside[1].dtype == torch.float32
    for value, wanted in zip(inside, _run(image.to(dtype), text.to(dtype), 100.0), strict=True):
        assert error(value, wanted) < (1e-6 if value.ndim == 0 else 3e-3)
    exact = clip_expected(image.to(dtype), text.to(dtype), 100.0)
    assert error(inside[0], exact.loss) < 1e-6
    with torch.autocast("cpu", dtype=dtype):
        wide = _run(image.double(), text.double(), 100.0, torch.float64)
    assert error(wide[0], clip_expected(image, text, 100.0).loss) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_normalizing_in_the_loss_equals_normalizing_before(dtype: torch.dtype) -> None:
    image, text = (x.to(dtype) for x in features(24, 16))
    image, text = image * torch.arange(24)[:, None].to(dtype), text * 7  # one row of zeros
    results = []
    for inside in (True, False):
        x, y = image.clone().requires_grad_(), text.clone().requires_grad_()
        a, b = (
            (x, y) if inside else (F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1))
        )
        loss = clip_loss(a, b, 20.0, normalize=inside)
        loss.backward()
        results.append((loss.detach(), x.grad, y.grad))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for value, wanted in zip(*results, strict=True):
        assert value is not None
        assert wanted is not None
        assert error(value, wanted) < tolerance
    module = ClipLoss(normalize=True)
    assert torch.equal(module(image, text, 20.0), clip_loss(image, text, 20.0, normalize=True))  # pyright: ignore[reportArgumentType]


def test_a_budget_below_zero_is_refused() -> None:
    image, text = features(3, 2)
    with pytest.raises(ValueError, match="memory_budget is a number of bytes, at least 0, not -1"):
        clip_loss(image, text, 1.0, memory_budget=-1)
    with pytest.raises(ValueError, match="memory_budget"):
        ClipLoss(memory_budget=-1)


def test_a_second_backward_is_the_first() -> None:
    image, text = features(9, 4)
    x = image.clone().requires_grad_()
    loss = clip_loss(x, text, 10.0)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_a_number_is_as_good_a_scale_as_a_tensor() -> None:
    """Also for fp64 features, whose digits a scale in fp32 would cost."""
    image, text = features(20, 9)
    expected = clip_expected(image, text, 14.285714)
    loss, gradients = clip_loss_and_grads(image, text, 14.285714)
    assert error(loss, expected.loss) < 1e-12
    assert error(gradients.d_image_features, expected.d_image) < 1e-12
    assert error(clip_loss(image, text, 14.285714), expected.loss) < 1e-12


@pytest.mark.parametrize("scale", [0.0, -5.0])
def test_scales_that_no_training_reaches(scale: float) -> None:
    image, text = features(20, 9)
    expected = clip_expected(image, text, scale, label_smoothing=0.1)
    result = _run(image, text, scale, torch.float64, label_smoothing=0.1)
    for value, wanted in zip(result, expected[:4], strict=True):
        assert error(value, wanted, floor=1e-6) < 1e-11


@pytest.mark.parametrize("options", [{}, {"ids": torch.arange(12) // 2}, {"label_smoothing": 0.1}])
def test_logits_beyond_every_exponential(options: dict) -> None:
    """Finite wherever |S| ≤ 1e30, and right: with such logits the loss is one of maxima."""
    image, text = (x.float() for x in features(12, 8))
    scale = 1e30
    expected = clip_expected(image, text, torch.tensor(scale).item(), **options)
    loss, d_image, d_text, d_scale = _run(image, text, scale, **options)
    assert error(loss, expected.loss) < 1e-5
    for value in (d_image, d_text, d_scale):
        assert torch.isfinite(value).all()


def test_order_of_pairs_and_of_towers() -> None:
    """Shuffled together, gradients shuffle; shuffled apart, pairs are lost and the loss rises."""
    image, text = features(23, 8, noise=0.5)
    order = torch.randperm(23)
    loss, d_image, d_text, d_scale = _run(image, text, 20.0, torch.float64)
    moved = _run(image[order], text[order], 20.0, torch.float64)
    swapped = _run(text, image, 20.0, torch.float64)
    wanted = (loss, d_image[order], d_text[order], d_scale)
    for value, reference_value in zip(moved, wanted, strict=True):
        torch.testing.assert_close(value, reference_value)
    for value, reference_value in zip(swapped, (loss, d_text, d_image, d_scale), strict=True):
        torch.testing.assert_close(value, reference_value)
    assert float(clip_loss(image, text.roll(1, 0), 20.0)) > float(loss) + 1.0


def test_features_of_any_layout() -> None:
    image, text = features(14, 6)
    same = image[:1].expand(14, 6)
    columns = text.T.contiguous().T
    expected = clip_expected(same, columns, 10.0)
    loss, gradients = clip_loss_and_grads(same, columns, torch.tensor(10.0))
    assert error(loss, expected.loss) < 1e-12
    assert error(gradients.d_image_features, expected.d_image) < 1e-12
    assert error(gradients.d_text_features, expected.d_text) < 1e-12


def test_not_a_number_stays_one() -> None:
    image, text = features(6, 4)
    image[3, 2] = math.nan
    assert math.isnan(clip_loss(image, text, 1.0))
    assert math.isnan(clip_loss(text, text, math.nan))
    _, gradients = clip_loss_and_grads(image, text, 1.0)
    assert gradients.d_image_features.isnan().any()
    assert gradients.d_text_features.isnan().any()


def test_without_gradients() -> None:
    image, text = features(6, 4)
    wanted = clip_loss(image, text, 10.0)
    with torch.no_grad():
        assert torch.equal(clip_loss(image.requires_grad_(), text, 10.0), wanted)
    with torch.inference_mode():
        assert torch.equal(clip_loss(image, text, 10.0), wanted)


def test_loss_and_gradients_without_autograd() -> None:
    image, text = (x.float() for x in features(19, 8))
    options = {"ids": torch.arange(19) // 3, "label_smoothing": 0.1}
    loss, d_image, d_text, d_scale = _run(image, text, 25.0, **options)
    value, gradients = clip_loss_and_grads(image, text, torch.tensor(25.0), **options)
    assert torch.equal(value, loss)
    assert torch.equal(gradients.d_image_features, d_image)
    assert torch.equal(gradients.d_text_features, d_text)
    assert gradients.d_logit_scale.shape == ()
    torch.testing.assert_close(gradients.d_logit_scale, d_scale)


@pytest.mark.parametrize(
    ("image", "text", "options", "kind", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 4), {}, ValueError, r"row by row.*\[3, 4\].*\[2, 4\]"),
        (torch.zeros(3), torch.zeros(3), {}, ValueError, r"\[pairs, dims\]"),
        (torch.zeros(0, 4), torch.zeros(0, 4), {}, ValueError, "at least one pair"),
        (torch.zeros(2, 0), torch.zeros(2, 0), {}, ValueError, "no dimensions"),
        (torch.zeros(2, 4).int(), torch.zeros(2, 4).int(), {}, TypeError, "int32"),
        (torch.zeros(2, 4), torch.zeros(2, 4).half(), {}, TypeError, "one dtype"),
        (torch.zeros(2, 4), torch.zeros(2, 4), {"ids": torch.zeros(3).long()}, ValueError, "ids"),
        (torch.zeros(2, 4), torch.zeros(2, 4), {"ids": torch.zeros(2)}, ValueError, "ids"),
        (torch.zeros(2, 4), torch.zeros(2, 4), {"ids": torch.zeros(2).int()}, ValueError, "int64"),
        (torch.zeros(2, 4), torch.zeros(2, 4), {"label_smoothing": -0.1}, ValueError, "smoothing"),
        (torch.zeros(2, 4), torch.zeros(2, 4), {"label_smoothing": 1.0}, ValueError, "smoothing"),
    ],
)
def test_input_that_does_not_fit(
    image: Tensor, text: Tensor, options: dict, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        clip_loss(image, text, 10.0, **options)


def test_scale_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"logit_scale is one number.*\[2\]"):
        clip_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2))
