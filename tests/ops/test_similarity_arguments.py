"""What `similarity` and `similarity_topk` take and refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip.ops.similarity import similarity, similarity_topk
from similarity_oracles import raw_features

A, B = torch.ones(3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: similarity(A[0], B), ValueError, r"queries are \[rows, dims\], not \[4\]"),
        (lambda: similarity(A, B[None]), ValueError, r"keys are \[rows, dims\]"),
        (lambda: similarity(A.long(), B.long()), TypeError, r"int64; use queries.float\(\)"),
        (lambda: similarity(A, B.double()), TypeError, r"one dtype.*convert one"),
        (lambda: similarity(A, B[:, :3]), ValueError, r"one number of dimensions.*\[5, 3\]"),
        (lambda: similarity(A[:, :0], B[:, :0]), ValueError, "at least 1"),
        (lambda: similarity(A, B[:0]), ValueError, "keys are empty"),
        (lambda: similarity(A, B.to("meta")), ValueError, "cpu and meta: move one"),
        (lambda: similarity(A, B, torch.ones(2)), ValueError, r"scale is one number.*\[2\]"),
        (lambda: similarity(A, B, torch.tensor(2)), TypeError, "scale is a floating point"),
        (lambda: similarity(A, B, torch.ones(1, device="meta")), ValueError, "scale is on meta"),
        (lambda: similarity(A, B, out_dtype=torch.int8), TypeError, "out_dtype is float32"),
        (lambda: similarity(A, B, impl="cuda"), ValueError, "impl is auto"),  # pyright: ignore[reportArgumentType]
        (lambda: similarity_topk(A, B, 6), ValueError, "k is from 1 to 5 .*not 6"),
        (lambda: similarity_topk(A, B, 0), ValueError, "not 0"),
        (lambda: similarity_topk(A, B, 2.0), TypeError, "k is an int, not float"),  # pyright: ignore[reportArgumentType]
        (lambda: similarity_topk(A, B, True), TypeError, "not bool"),
        (lambda: similarity_topk(A, B[:0], 1), ValueError, "keys are empty"),
        (lambda: similarity_topk(A, B.half(), 1), TypeError, "one dtype"),
        (
            lambda: similarity_topk(A.double(), B.double(), 1, impl="triton"),
            ValueError,
            "fp64|CUDA",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(
    call: Callable[[], Tensor], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_derivatives_that_there_are_not_are_refused() -> None:
    queries, keys = (x.requires_grad_() for x in raw_features(3, 5, 4))
    with pytest.raises(RuntimeError, match=r"not differentiable.*keys\[indices\]"):
        similarity_topk(queries, keys, 2)[0].sum().backward()
    (first,) = torch.autograd.grad(similarity(queries, keys).sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


class Operators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_number_as_scale_is_no_copy_from_the_host() -> None:
    with FakeTensorMode(), Operators() as operators:
        features = torch.empty(3, 4, device="cuda")
        result = similarity(features, features, 2.5)
    assert result.shape == (3, 3)
    assert operators.names[1:] == ["aten.full.default", "fastclip.similarity_matrix.default"]
