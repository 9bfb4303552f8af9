"""Similarity and nearest keys: the operators by the reference, the kernels in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    whole_numbers,
)
from triton_support import skip_without_interpreter

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRADIENT_TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3}
GPU_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    skip_without_interpreter()
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
    assert len(report["nearest"]) == 26
    for case, found in report["nearest"].items():
        assert found["values"] is True, case
        assert found["indices"] is True, case
        assert found["error"] < 1e-6, case
    assert len(report["ties"]) == 10
    for case, found in report["ties"].items():
        assert found is True, case


def test_kernels_select_from_stretches(report: dict[str, Any]) -> None:
    assert len(report["stretches of rows"]) == 5
    assert len(report["as on a device"]) == 2
    for case, found in (*report["stretches of rows"].items(), *report["as on a device"].items()):
        assert found is True, case
    assert report["chunks alive"] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "width", "k"),
    [(1, 200, 100), (1, 1 << 30, 65), (256, 1 << 20, 100), (1024, 1 << 18, 1024), (1, 4224, 10)],
)
def test_selection_is_cut_to_fill_a_device(rows: int, width: int, k: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from fastclip.kernels.similarity import SELECT_ENTRIES, select_stretches, slots_for

    slots, processors = slots_for(k), 132
    stretches = select_stretches(rows, width, k, processors)
    blocks = -(-width // slots)
    programs = stretches * -(-rows // (SELECT_ENTRIES // slots))
    fills = programs >= 4 * processors
    assert fills or stretches == max(1, min(blocks // 8, int(blocks**0.5)))
    assert stretches == 1 or rows * stretches * k <= 8 * processors * SELECT_ENTRIES
    assert fills == (width > 1 << 17)
    assert select_stretches(rows, width, k, 0) == 1


def test_kernels_in_odd_cases(report: dict[str, Any]) -> None:
    assert len(report["edges"]) == 4
    for case, found in report["edges"].items():
        assert found is True, case
    assert report["longest lists"] is True
    assert report["rising"] is True
    assert report["odd numbers"] is True
    assert report["operators"] is True
    assert report["compiled"] < 1e-6


def _on_gpu(dtype: torch.dtype, *features: Tensor) -> list[Tensor]:
    return [x.cuda().to(dtype) for x in features]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5), (130, 257, 64), (300, 1001, 768), (65, 4099, 1152)])
def test_gpu_matrices_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    queries, keys = _on_gpu(dtype, *raw_features(*shape))
    scale = torch.tensor(14.25, device="cuda")
    leaves = [x.requires_grad_() for x in (queries, keys, scale)]
    result = similarity(*leaves, impl="triton")
    wanted = expected_similarity(queries.detach(), keys.detach(), 14.25, True)
    assert error(result.detach(), wanted) < 1e-5
    upstream = torch.randn_like(result)
    found = torch.autograd.grad(result, leaves, upstream)
    gradients = expected_gradients(upstream, queries, keys, 14.25, True)
    terms = float((upstream * wanted).norm()) / 14.25  # of the scale's gradient; they cancel
    for value, gradient in zip(found, gradients, strict=True):
        assert error(value, gradient, 0.0 if value.ndim else terms) < GPU_TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("k", [1, 10, 100])
def test_gpu_nearest_keys(k: int, dtype: torch.dtype) -> None:
    for m, n, dims in ((1, 100, 5), (33, 20_011, 64), (1025, 5003, 200)):
        queries, keys = _on_gpu(dtype, whole_numbers(m, dims, 0), whole_numbers(n, dims, 1))
        keys[n // 3, 0], queries[m // 2, 1:] = float("nan"), 0
        found = similarity_topk(queries, keys, k, normalize=False, impl="triton")
        wanted = stable_topk(expected_similarity(queries, keys, 1.0, False), k)
        assert torch.equal(found[1], wanted[1]), (m, n, dims)
        assert torch.equal(found[0].double().nan_to_num(1e9), wanted[0].nan_to_num(1e9))
        queries, keys = _on_gpu(dtype, *raw_features(m, n, dims))
        values = similarity_topk(queries, keys, k, impl="triton")[0]
        wanted = stable_topk(expected_similarity(queries, keys, 1.0, True), k)
        assert error(values, wanted[0]) < 1e-5, (m, n, dims)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [10, 100])
def test_gpu_graphs_replay(k: int) -> None:
    queries, keys = _on_gpu(torch.bfloat16, *raw_features(200, 9001, 256))
    scale, upstream = torch.tensor(2.5, device="cuda"), torch.randn(200, 9001, device="cuda")

    def step() -> list[Tensor]:
        matrix = similarity(queries, keys, 2.5, impl="triton")
        gradients = similarity_gradients(upstream, queries, keys, scale, True, True, True, "triton")
        return [matrix, *gradients, *similarity_topk(queries, keys, k, impl="triton")]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for features, others in zip((queries, keys), raw_features(200, 9001, 256, seed=1), strict=True):
        features.copy_(others)
    graph.replay()
    torch.cuda.synchronize()
    for value, wanted in zip(outputs, step(), strict=True):
        assert torch.equal(value, wanted)
