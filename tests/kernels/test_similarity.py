"""Similarity and nearest keys: the operators by the reference, the kernels in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.kernels import reference_similarity
from fastclip.ops.similarity import (
    similarity,
    similarity_gradients,
    similarity_matrix,
    similarity_neighbours,
    similarity_topk,
)
from loss_oracles import error
from similarity_oracles import (
    axes,
    expected_gradients,
    expected_similarity,
    raw_features,
    stable_topk,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRADIENT_TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    pytest.importorskip("triton", reason="Triton is not installed")
    program = Path(__file__).parents[1] / "interpreted_similarity.py"
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 5), (7, 13, 64), (12, 5, 768)])
def test_similarity_and_its_gradients(
    shape: tuple[int, int, int], normalize: bool, dtype: torch.dtype
) -> None:
    queries, keys = (x.to(dtype) for x in raw_features(*shape))
    if not normalize:
        queries, keys = queries / 16, keys / 16
    scale = torch.tensor([14.25], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = [x.requires_grad_() for x in (queries, keys, scale)]
    result = similarity(*leaves, normalize=normalize)
    accuracy = 1e-12 if dtype == torch.float64 else 1e-6
    assert result.dtype == scale.dtype
    wanted = expected_similarity(queries.detach(), keys.detach(), 14.25, normalize)
    assert error(result.detach(), wanted) < accuracy
    upstream = torch.randn_like(result)
    result.backward(upstream)
    gradients = expected_gradients(upstream, queries, keys, 14.25, normalize)
    floor = 1e-3 * float(gradients[2].norm())
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        rounding = torch.finfo(dtype).eps if leaf.dtype == dtype else 0.0
        assert error(leaf.grad.reshape(gradient.shape), gradient, floor) < accuracy + rounding


@pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 22])
def test_chunks_are_the_whole(chunk_elements: int) -> None:
    queries, keys = (x.double() for x in raw_features(9, 17, 6))
    scale, upstream = torch.tensor(3.0).double(), torch.randn(9, 17).double()
    options: dict[str, Any] = {"normalize": True, "chunk_elements": chunk_elements}
    matrix = reference_similarity.similarity(
        queries, keys, scale, out_dtype=torch.float64, **options
    )
    assert error(matrix, expected_similarity(queries, keys, 3.0, True)) < 1e-14
    found = reference_similarity.similarity_gradients(upstream, queries, keys, scale, **options)
    wanted = expected_gradients(upstream, queries, keys, 3.0, True)
    for value, gradient in zip(found, wanted, strict=True):
        assert value is not None
        assert error(value, gradient) < 1e-14
    top = reference_similarity.similarity_topk(queries, keys, 4, **options)
    assert torch.equal(top.indices, stable_topk(matrix, 4)[1])


def test_rows_without_length_follow_normalize() -> None:
    queries, keys = (x.double() for x in raw_features(4, 6, 5))
    queries[1], keys[2], keys[4] = 0, 0, 1e-13 * keys[4]
    leaves = (queries.requires_grad_(), keys.requires_grad_())
    result = similarity(*leaves)
    assert not result[1].any()
    assert not result[:, 2].any()
    upstream = torch.randn_like(result)
    found = torch.autograd.grad(result, leaves, upstream)
    wanted = expected_gradients(upstream, *leaves, 1.0, True)
    for value, gradient in zip(found, wanted[:2], strict=True):
        torch.testing.assert_close(value, gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result, expected_similarity(*leaves, 1.0, True))


def test_scale_may_be_zero_or_a_number() -> None:
    queries, keys = raw_features(4, 6, 5)
    scale = torch.tensor(0.0, requires_grad=True)
    similarity(queries, keys, scale).sum().backward()
    assert scale.grad is not None
    wanted = expected_similarity(queries, keys, 1.0, True).sum()
    assert error(scale.grad, wanted) < 1e-5
    assert torch.equal(similarity(queries, keys, 2.5), similarity(queries, keys, torch.tensor(2.5)))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_results_are_rounded_once(out_dtype: torch.dtype) -> None:
    queries, keys = (x.bfloat16() for x in raw_features(4, 6, 5))
    result = similarity(queries, keys, 3.0, out_dtype=out_dtype)
    assert result.dtype == out_dtype
    assert torch.equal(result, similarity(queries, keys, 3.0).to(out_dtype))


def test_autocast_changes_nothing() -> None:
    queries, keys = (x.requires_grad_() for x in raw_features(4, 6, 300))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            matrix = similarity(queries, keys)
            gradients = torch.autograd.grad(matrix.square().sum(), (queries, keys))
            values = similarity_topk(queries.detach(), keys.detach(), 3)[0]
        results.append(torch.cat([x.ravel() for x in (matrix, *gradients, values)]))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 1024, 1100])
def test_nearest_keys_are_a_stable_sorts(k: int, dtype: torch.dtype) -> None:
    keys = axes(max(k, 60), 4, 1).to(dtype)
    queries = axes(9, 4, 0).to(dtype)
    if k > 1024:
        with pytest.raises(ValueError, match=r"k is from 1 to 1024 .*sort the rows of similarity"):
            similarity_topk(queries, keys, k)
        return
    values, indices = similarity_topk(queries, keys, k)
    wanted = stable_topk(expected_similarity(queries, keys, 1.0, True), k)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64
    assert torch.equal(values.double(), wanted[0])
    assert torch.equal(indices, wanted[1])


def test_nearest_keys_of_the_same_bits() -> None:
    queries, keys = raw_features(8, 300, 20)
    values, indices = similarity_topk(queries, keys, 300)
    wanted = stable_topk(similarity(queries, keys), 300)
    assert torch.equal(values, wanted[0])
    assert torch.equal(indices, wanted[1])


def test_order_of_odd_numbers() -> None:
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([0.0, -0.0, nan, -inf, 1e-42, inf, -1e-42, 1.0, -nan, -1.0, 3e38, -3e38])
    order = reference_similarity.sortable(scores)
    assert torch.equal(
        order.sort(descending=True, stable=True)[1], scores.sort(descending=True, stable=True)[1]
    )
    queries, keys = torch.tensor([[1.0]]), torch.tensor([[1.0], [nan], [inf], [2.0], [nan]])
    values, indices = similarity_topk(queries, keys, 4, normalize=False)
    assert indices.tolist() == [[1, 4, 2, 3]]
    assert values[0, :2].isnan().all()


def test_no_queries() -> None:
    queries, keys = raw_features(0, 6, 5)
    leaf = keys.requires_grad_()
    result = similarity(queries, leaf)
    assert result.shape == (0, 6)
    result.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()
    assert [tuple(x.shape) for x in similarity_topk(queries, keys, 3)] == [(0, 3), (0, 3)]


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


def test_operators_pass_torchs_checks() -> None:
    leaves = [x.requires_grad_() for x in (*raw_features(5, 9, 6), torch.tensor([3.0]))]
    plain = [x.detach() for x in leaves]
    torch.library.opcheck(similarity_matrix, (*leaves, True, torch.bfloat16, "reference"))
    torch.library.opcheck(similarity_neighbours, (*plain[:2], 4, True, "reference"))
    arguments = (torch.ones(5, 9), *plain, True, True, False, "reference")
    torch.library.opcheck(similarity_gradients, arguments)


def test_compiles_as_one_graph() -> None:
    def loss(queries: Tensor, keys: Tensor) -> Tensor:
        values, indices = similarity_topk(queries.detach(), keys.detach(), 2)
        matrix = similarity(2 * queries, keys, 5.0)
        return (matrix.gather(1, indices) * values).sum() + matrix.logsumexp(1).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in raw_features(6, 11, 8)]
    plain, whole = (torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled))
    for value, expected in zip(whole, plain, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_kernels_matrices_and_gradients(report: dict[str, Any], dtype: str) -> None:
    cases = {k: v for k, v in report["matrices"].items() if k.startswith(f"{dtype} ")}
    assert len(cases) == 14
    worst: dict[str, float] = {}
    for case, errors in cases.items():
        assert len(errors) == 4
        for name, value in errors.items():
            assert value < (1e-6 if name == "result" else GRADIENT_TOLERANCE[dtype]), (case, name)
            worst[name] = max(worst.get(name, 0.0), value)
    print(f"{dtype}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    assert len(report["autograd"][dtype]) == 6
    for case, value in report["autograd"][dtype].items():
        assert value < GRADIENT_TOLERANCE[dtype] + 1e-3 * (dtype == "fp16"), case


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_kernels_rows_without_length(report: dict[str, Any], dtype: str) -> None:
    errors = report["zero rows"][dtype]
    assert len(errors) == 7
    assert errors.pop("zeros") == 0.0
    for name, value in errors.items():
        assert value < (1e-6 if name == "result" else GRADIENT_TOLERANCE[dtype]), name


def test_kernels_nearest_keys(report: dict[str, Any]) -> None:
    assert len(report["nearest"]) == 24
    for case, found in report["nearest"].items():
        assert found["values"] is True, case
        assert found["indices"] is True, case
        assert found["error"] < 1e-6, case
    assert len(report["ties"]) == 10
    for case, found in report["ties"].items():
        assert found is True, case


def test_kernels_in_odd_cases(report: dict[str, Any]) -> None:
    assert len(report["edges"]) == 4
    for case, found in report["edges"].items():
        assert found is True, case
    assert report["longest lists"] is True
    assert report["rising"] is True
    assert report["odd numbers"] is True
    assert report["operators"] is True
    assert report["compiled"] < 1e-6
