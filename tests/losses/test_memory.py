"""No loss ever holds the N×N matrix: what is alive at once is O(N·D) and a few chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip.kernels import reference
from fastclip.losses import clip_loss, clip_loss_and_grads, siglip_loss, siglip_loss_and_grads

PAIRS, DIMS, CHUNK = 4096, 8, 1 << 17
BYTES_PER_PAIR = 4 * 4 * DIMS + 16 * 8
"""Two gradients and their copies in fp32, and statistics in fp64; a row of S would be 16,384."""


class Allocations(TorchDispatchMode):
    """Records every storage that an operator returns and how many bytes of them live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.peak = 0, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return output


@contextmanager
def _chunks_of(elements: int) -> Iterator[None]:
    names = ("contrastive_statistics", "contrastive_products", "sigmoid_loss", "sigmoid_products")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            defaults = getattr(reference, name).__kwdefaults__
            patch.setitem(defaults, "chunk_elements", elements)
        yield


def _clip(image: Tensor, text: Tensor, ids: Tensor | None) -> None:
    smoothing = 0.0 if ids is None else 0.1
    clip_loss(image, text, 10.0, ids=ids, label_smoothing=smoothing).backward()


def _siglip(image: Tensor, text: Tensor, ids: Tensor | None) -> None:
    siglip_loss(image, text, 10.0, -10.0, ids=ids).backward()


def _clip_without_autograd(image: Tensor, text: Tensor, ids: Tensor | None) -> None:
    clip_loss_and_grads(image, text, 10.0, ids=ids)


def _siglip_without_autograd(image: Tensor, text: Tensor, ids: Tensor | None) -> None:
    siglip_loss_and_grads(image, text, 10.0, -10.0, ids=ids)


Loss = Callable[[Tensor, Tensor, Tensor | None], None]


def _measure(loss: Loss, pairs: int, several: bool) -> Allocations:
    image, text = (F.normalize(torch.randn(pairs, DIMS), dim=1).requires_grad_() for _ in range(2))
    ids = torch.arange(pairs) // 2 if several else None
    with Allocations() as allocations:
        loss(image, text, ids)
    return allocations


def _naive(image: Tensor, text: Tensor, ids: Tensor | None) -> None:
    F.cross_entropy(10.0 * image @ text.T, torch.arange(len(image))).backward()


def test_the_instrument_sees_the_matrix_forward_and_backward() -> None:
    seen = _measure(_naive, 512, False)
    assert seen.largest == 512 * 512 * 4
    assert 3 * 512 * 512 * 4 <= seen.peak < 8 * 512 * 512 * 4  # logits, log-softmax, gradient


@pytest.mark.parametrize("several", [False, True], ids=["one-positive", "several-positives"])
@pytest.mark.parametrize("loss", [_clip, _siglip, _clip_without_autograd, _siglip_without_autograd])
def test_memory_is_a_few_chunks_and_linear_in_pairs(loss: Loss, several: bool) -> None:
    with _chunks_of(CHUNK):
        half, whole = (_measure(loss, pairs, several) for pairs in (PAIRS // 2, PAIRS))
    for seen, pairs in ((half, PAIRS // 2), (whole, PAIRS)):
        assert seen.largest <= 4 * CHUNK
        assert seen.peak <= 8 * 4 * CHUNK + BYTES_PER_PAIR * pairs
    assert whole.peak < PAIRS * PAIRS * 4 / 8
    assert whole.peak - half.peak <= BYTES_PER_PAIR * PAIRS // 2


@pytest.mark.parametrize("loss", [_clip, _siglip])
def test_chunk_of_the_defaults(loss: Loss) -> None:
    assert _measure(loss, 2500, False).largest <= 4 * reference.CHUNK_ELEMENTS < 4 * 2500 * 2500


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_loss_that_is_kept_keeps_nothing_after_its_backward(kind: str) -> None:
    """As autograd's own saved tensors, and as often as it is told to retain them."""
    leaves = image, text = tuple(torch.randn(9, 4, requires_grad=True) for _ in range(2))
    if kind == "softmax":
        loss = clip_loss(image, text, 10.0, normalize=True)
    else:
        loss = siglip_loss(image, text, 10.0, -10.0, normalize=True)
    node: Any = loss.grad_fn
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert len(node.saved_tensors) > 5
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not any(isinstance(held, Tensor) for held in vars(node.stripe).values())
    with pytest.raises(RuntimeError, match="saved"):
        _ = node.saved_tensors
