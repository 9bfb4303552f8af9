"""`clip_loss` against the fp64 definition, on one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss as OpenClipLoss
from torch import Tensor

from fastclip.kernels import reference
from fastclip.kernels.reference import compute_dtype
from fastclip.losses import ClipLoss, clip_loss, clip_loss_and_grads
from loss_oracles import clip_expected, error, features

SCALES = (1.0, 14.285714, 100.0)


def _run(
    image: Tensor, text: Tensor, scale: float, dtype: torch.dtype = torch.float32, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = image.to(dtype).requires_grad_()
    y = text.to(dtype).requires_grad_()
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
@pytest.mark.parametrize(("pairs", "dims"), [(1, 5), (2, 1), (3, 7), (33, 17), (130, 64)])
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("scale", SCALES)
def test_half_precision_costs_the_rounding_of_the_result_only(
    dtype: torch.dtype, tolerance: float, scale: float
) -> None:
    image, text = (x.to(dtype) for x in features(65, 48))
    expected = clip_expected(image, text, scale)  # of the rounded features
    loss, d_image, d_text, d_scale = _run(image, text, scale, dtype)
    assert loss.dtype == torch.float32
    assert error(loss, expected.loss) < 2e-5
    assert error(d_image, expected.d_image) < tolerance
    assert error(d_text, expected.d_text) < tolerance
    assert error(d_scale, expected.d_scale, floor=1e-4) < 2e-5


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
    for function in ("contrastive_statistics", "contrastive_gradients"):
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


def test_features_changed_in_place_are_refused() -> None:
    image, text = (x.float() for x in features(8, 4))
    x = image.clone().requires_grad_()
    held = x * 1
    loss = clip_loss(held, text, 10.0)
    with torch.no_grad():
        held.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_changes_nothing() -> None:
    image, text = (x.float() for x in features(24, 16))
    plain = _run(image, text, 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _run(image, text, 100.0)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


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


def test_module_equals_open_clips() -> None:
    image, text = (x.float() for x in features(31, 20))
    results = []
    for module in (OpenClipLoss(), ClipLoss()):
        x, y = image.clone().requires_grad_(), text.clone().requires_grad_()
        s = torch.tensor(100.0, requires_grad=True)
        output = module(x, y, s, output_dict=True)
        assert set(output) == {"contrastive_loss"}
        output["contrastive_loss"].backward()
        results.append((output["contrastive_loss"].detach(), x.grad, y.grad, s.grad))
    for theirs, ours in zip(*results, strict=True):
        assert error(ours, theirs) < 1e-4  # open_clip's fp32 is the noisier one
    scale = torch.tensor(7.0)
    for a, b in zip(
        OpenClipLoss().get_logits(image, text, scale),
        ClipLoss().get_logits(image, text, scale),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_module_takes_open_clips_arguments() -> None:
    module = ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1
    )
    image, text = (x.float() for x in features(5, 4))
    assert float(module(image, text, 10.0, None)) == float(clip_loss(image, text, 10.0))
    assert float(module(image, text, 10.0, torch.tensor(-3.0))) == float(
        clip_loss(image, text, 10.0)
    )
    with pytest.raises(ValueError, match="use_horovod"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="initialised before the loss"):
        ClipLoss(rank=1, world_size=4)
    with pytest.raises(ValueError, match="rank=4 is not one of world_size=4"):
        ClipLoss(rank=4, world_size=4)
    with pytest.raises(ValueError, match="without world_size"):
        ClipLoss(rank=1)


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


def test_largest_tensor_is_a_chunk_not_the_matrix() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    pairs, dims = 6000, 8

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return output

    image, text = (F.normalize(torch.randn(pairs, dims), dim=1).requires_grad_() for _ in "it")
    with Largest():
        clip_loss(image, text, torch.tensor(10.0, requires_grad=True)).backward()
    assert Largest.elements <= reference.CHUNK_ELEMENTS < pairs * pairs
    assert math.isfinite(float(image.grad.sum()))  # pyright: ignore[reportOptionalMemberAccess]
