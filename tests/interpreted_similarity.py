"""Runs the similarity kernels in Triton's interpreter, on a CPU, and prints what they do as JSON.

A program of its own, as `interpreted.py` is and for its reasons:
``TRITON_INTERPRET=1 python tests/interpreted_similarity.py``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastclip.kernels import similarity as kernels
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

warnings.filterwarnings("ignore", category=RuntimeWarning)

# queries, keys, dims
SHAPES = (
    (1, 1, 5),
    (33, 70, 64),
    (40, 35, 512),
    (31, 33, 640),
    (34, 66, 768),
    (5, 40, 1024),
    (33, 7, 1152),
)
# queries, keys, dims, k, stretches
TOPK_SHAPES = (
    (1, 1, 5, 1, None),
    (33, 130, 5, 5, 3),
    (34, 70, 64, 1, 2),
    (3, 70, 64, 70, None),
    (35, 67, 512, 5, None),
    (4, 33, 640, 33, 2),
    (4, 131, 768, 17, 5),
    (2, 40, 1024, 40, 1),
    (5, 200, 64, 70, 2),
    (33, 40, 1152, 5, 2),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def _poison() -> None:
    """Make memory that is asked for without content hold NaN, or a far-off integer."""
    plain = Tensor.new_empty

    def poisoned(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        tensor = plain(self, *arguments, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**40))

    Tensor.new_empty = poisoned


def matrices(name: str, shape: tuple[int, int, int], normalize: bool) -> dict[str, float]:
    """Errors of result and gradients against fp64, on the same rounded features."""
    m, n, dims = shape
    queries, keys = (x.to(DTYPES[name]) for x in raw_features(m, n, dims))
    scale = torch.tensor([14.25])
    # As small as a mean over many pairs makes it: below what fp16 holds.
    upstream = 1e-8 * torch.randn(m, n, generator=torch.Generator().manual_seed(2))
    leaves = [x.clone().requires_grad_() for x in (queries, keys, scale)]
    result = similarity(*leaves, normalize=normalize, impl="triton")
    errors = {
        "result": error(result.detach(), expected_similarity(queries, keys, 14.25, normalize))
    }
    found = similarity_gradients(upstream, *leaves, normalize, True, True, "triton")
    wanted = expected_gradients(upstream, queries, keys, 14.25, normalize)
    for what, value, expected in zip(("queries", "keys", "scale"), found, wanted, strict=True):
        # With one query and one key, the gradient of their cosine is rounding of its parts.
        floor = 1e-3 * float(wanted[2].norm())
        errors[f"d_{what}"] = error(value.detach().reshape(expected.shape), expected, floor)
    return errors


def through_autograd(dtype: torch.dtype) -> dict[str, float]:
    """Gradients as backward leaves them, each asked for alone and all together."""
    queries, keys = (x.to(dtype) for x in raw_features(7, 9, 12))
    upstream = torch.randn(7, 9, generator=torch.Generator().manual_seed(2))
    wanted = expected_gradients(upstream, queries, keys, 3.0, True)
    errors = {}
    for asked in ((0,), (1,), (2,), (0, 1, 2)):
        leaves = [queries.clone(), keys.clone(), torch.tensor([3.0])]
        for place in asked:
            leaves[place].requires_grad_()
        similarity(*leaves, impl="triton").backward(upstream)
        for place, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (place in asked)
            if leaf.grad is not None:
                assert leaf.grad.dtype == leaf.dtype
                assert leaf.grad.shape == leaf.shape
                value = leaf.grad.reshape(wanted[place].shape)
                errors[f"{asked} {place}"] = error(value, wanted[place])
    return errors


def zero_rows(dtype: torch.dtype) -> dict[str, float]:
    """Errors beside and at rows without length, whose own gradient is 1e12 times the others'."""
    queries, keys = (x.to(dtype) for x in raw_features(6, 40, 20))
    queries[2], keys[[0, 33]] = 0, 0
    upstream = 1e-8 * torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    scale = torch.tensor(14.25)
    result = similarity(queries, keys, scale, impl="triton")
    report = {
        "zeros": float(result[2].abs().max() + result[:, [0, 33]].abs().max()),
        "result": error(result, expected_similarity(queries, keys, 14.25, True)),
    }
    found = similarity_gradients(upstream, queries, keys, scale, True, True, True, "triton")
    wanted = expected_gradients(upstream, queries, keys, 14.25, True)
    for name, value, expected, rows in zip(
        ("queries", "keys"), found, wanted, (queries, keys), strict=False
    ):
        zero = (rows == 0).all(1)
        report[f"d_{name}"] = error(value[~zero], expected[~zero])
        report[f"d_{name} of zero rows"] = error(value[zero], expected[zero])
    report["d_scale"] = error(found[2], wanted[2])
    return report


def nearest(name: str, shape: tuple, normalize: bool) -> dict[str, Any]:
    """The k nearest against a stable sort of the kernels' own matrix, and of fp64's."""
    m, n, dims, k, stretches = shape
    queries, keys = (x.to(DTYPES[name]) for x in raw_features(m, n, dims))
    keys[n // 2] = keys[0]
    queries[m // 2] = 0 * queries[0] if m > 1 else queries[0]
    scores = similarity(queries, keys, normalize=normalize, impl="triton")
    found = kernels.similarity_topk(queries, keys, k, normalize=normalize, stretches=stretches)
    values, indices = stable_topk(scores, k)
    wanted = stable_topk(expected_similarity(queries, keys, 1.0, normalize), k)[0]
    return {
        "values": torch.equal(found.values, values),
        "indices": torch.equal(found.indices, indices),
        "error": error(found.values, wanted),
    }


def exact_ties() -> dict[str, bool]:
    """Whether dozens of equal similarities come in the order of a stable sort in fp64."""
    report = {}
    for name, dtype in DTYPES.items():
        queries, keys = axes(4, 4, 0).to(dtype), axes(100, 4, 1).to(dtype)
        for k, stretches in ((1, 2), (5, 1), (5, 3), (40, 2), (70, None)):
            wanted = stable_topk(expected_similarity(queries, keys, 1.0, True), k)
            found = kernels.similarity_topk(queries, keys, k, normalize=True, stretches=stretches)
            same = (torch.equal(x, y.to(x.dtype)) for x, y in zip(found, wanted, strict=True))
            report[f"{name} {k} {stretches}"] = all(same)
    return report


def longest_lists() -> bool:
    """Whether lists of 1,024 are right."""
    kernels.SELECT_ENTRIES = 1024
    scores = torch.randn(1, 1030).round(decimals=1)
    result = kernels.Neighbours(scores.new_empty(1, 1024), scores.new_empty(1, 1024).long())
    kernels.select(scores, 1024, result)
    wanted = stable_topk(scores, 1024)
    return all(torch.equal(x, y) for x, y in zip(result, wanted, strict=True))


def falling_and_rising() -> bool:
    """Whether keys that come best last, so that every tile replaces the list, are found."""
    keys = torch.arange(200.0)[:, None] * torch.ones(1, 5)
    queries = torch.tensor([[1.0], [-1.0]]) * torch.ones(1, 5)
    _, indices = kernels.similarity_topk(queries, keys, 40, normalize=False, stretches=1)
    return indices.tolist() == [list(range(199, 159, -1)), list(range(40))]


def odd_numbers() -> bool:
    """Whether NaN, infinities and −0 are ordered as a stable sort orders them."""
    inf, nan = float("inf"), float("nan")
    row = [0.0, -0.0, nan, -inf, 1e-42, inf, -1e-42, 0.0, -nan, -1.0, inf, -inf, nan, -0.0]
    scores = torch.tensor([row, row[::-1], [-inf] * 14, [nan] * 14])
    good = True
    for k in (1, 5, 14):
        result = kernels.Neighbours(scores.new_empty(4, k), scores.new_empty(4, k).long())
        kernels.select(scores, k, result)
        values, indices = stable_topk(scores, k)
        good &= torch.equal(result.indices, indices)
        good &= torch.equal(result.values.nan_to_num(7.0), values.nan_to_num(7.0))
    queries, keys = raw_features(3, 70, 6)
    queries[1, 0], keys[[4, 50], 3], keys[9], keys[60] = nan, nan, inf, -inf
    scores = similarity(queries, keys, normalize=False, impl="triton")
    for k in (1, 9, 70):
        values, indices = similarity_topk(queries, keys, k, normalize=False, impl="triton")
        wanted = stable_topk(scores, k)
        good &= torch.equal(indices, wanted[1])
        good &= torch.equal(values.nan_to_num(7.0), wanted[0].nan_to_num(7.0))
    return good


def _same(found: kernels.Neighbours, wanted: tuple[Tensor, Tensor]) -> bool:
    values = (x.nan_to_num(1e9) for x in (found.values, wanted[0].to(found.values.dtype)))
    return torch.equal(*values) and torch.equal(found.indices, wanted[1])


def stretches_of_rows() -> dict[str, bool]:
    """Whether rows that are cut for selection give what a stable sort of the whole row gives."""
    inf, nan = float("inf"), float("nan")
    odd = torch.tensor([0.0, -0.0, nan, -inf, 1e-42, inf, -nan, -1.0, inf, -inf, nan])
    report = {}
    for width, k, stretches, cut_into in (
        (77, 1, 2, 2),
        (77, 16, 3, 3),  # the last of them has fewer than k
        (77, 5, 99, 5),
        (16, 16, 3, 1),
        (200, 40, 99, 4),
    ):
        scores = torch.randn(6, width).round(decimals=1)
        scores[1], scores[2], scores[3], scores[4] = 0.0, nan, -inf, odd.repeat(24)[:width]
        scores[5, [0, width - 1]] = nan
        result = kernels.Neighbours(scores.new_empty(6, k), scores.new_empty(6, k).long())
        launched, _ = _passes(kernels.select, scores, k, result, stretches)
        expected = [cut_into, 1] if cut_into > 1 else [1]
        case = f"{width} {k} {stretches}"
        report[case] = launched == expected and _same(result, stable_topk(scores, k))
    return report


def _passes(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[list[int], Any]:
    """Into how many stretches each pass of the selection cuts its rows, and the call's result."""
    plain, seen = kernels._select, []

    def noted(*arguments: Any) -> None:
        seen.append(arguments[4])
        plain(*arguments)

    kernels._select = noted
    result = call(*arguments, **options)
    kernels._select = plain
    return seen, result


def as_on_a_device() -> dict[str, bool]:
    """Whether cuts chosen for a device's multiprocessors change nothing, of lists and of scores."""
    report = {}
    queries, keys = whole_numbers(3, 6, 0), whole_numbers(520, 6, 1)
    keys[470, 2], queries[1] = float("nan"), 0
    scores = similarity(queries, keys, normalize=False, impl="triton")
    plain = kernels.multiprocessors, kernels.STREAMED_K
    kernels.multiprocessors, kernels.STREAMED_K = lambda device: 8, 5
    for k, stretches, cut_into in ((3, 17, 2), (9, None, 4)):
        launched, found = _passes(
            kernels.similarity_topk, queries, keys, k, normalize=False, stretches=stretches
        )
        report[str(k)] = launched == [cut_into, 1] and _same(found, stable_topk(scores, k))
    kernels.multiprocessors, kernels.STREAMED_K = plain
    return report


def chunks_alive() -> list[int]:
    """Of how many chunks the scores are held at a time, by each chunk; where k is large."""
    queries, keys = raw_features(8, 80, 6)
    chunks, counts = [], []
    plain = Tensor.new_empty

    def noted(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        tensor = plain(self, *arguments, **options)
        if tensor.shape == (2, 80):
            gc.collect()  # the interpreter leaves its arguments in cycles
            chunks.append(StorageWeakRef(tensor.untyped_storage()))
            counts.append(sum(not chunk.expired() for chunk in chunks))
        return tensor

    Tensor.new_empty = noted
    kernels.similarity_topk(queries, keys, 70, normalize=True, chunk_elements=160)
    Tensor.new_empty = plain
    return counts


def edges() -> dict[str, bool]:
    """No queries, features that are not contiguous, results in half precision."""
    queries, keys = raw_features(5, 40, 12)
    wide = torch.stack((queries, queries), dim=2)[:, :, 0]
    assert wide.stride(1) == 2
    same = similarity(queries, keys, impl="triton")
    strided = similarity(wide, keys.T.contiguous().T, impl="triton")
    top = similarity_topk(wide, keys, 3, impl="triton")
    none = similarity_topk(queries[:0], keys, 3, impl="triton")
    half = similarity(queries, keys, out_dtype=torch.float16, impl="triton")
    # More chunks of queries than one, where k is large.
    chunked = kernels.similarity_topk(queries, keys, 39, normalize=True, chunk_elements=80)
    kernels.STREAMED_K = 2
    selected = kernels.similarity_topk(queries, keys, 39, normalize=True, chunk_elements=80)
    return {
        "strides": torch.equal(same, strided) and torch.equal(top[1], stable_topk(same, 3)[1]),
        "no queries": none[0].shape == none[1].shape == (0, 3)
        and similarity(queries[:0], keys, impl="triton").shape == (0, 40),
        "half": half.dtype == torch.float16 and torch.equal(half, same.half()),
        "chunks": all(torch.equal(x, y) for x, y in zip(chunked, selected, strict=True)),
    }


def operators() -> bool:
    """torch.library's own checks of schema, autograd and fake implementation."""
    queries, keys = raw_features(5, 9, 6)
    scale = torch.tensor([3.0], requires_grad=True)
    leaves = (queries.requires_grad_(), keys.requires_grad_(), scale)
    plain = tuple(x.detach() for x in leaves)
    for normalize in (True, False):
        for dtype in (torch.float32, torch.float16):
            torch.library.opcheck(similarity_matrix, (*leaves, normalize, dtype, "triton"))
        torch.library.opcheck(similarity_neighbours, (*plain[:2], 4, normalize, "triton"))
    for need in ((True, True), (True, False), (False, True)):
        arguments = (torch.ones(5, 9), *plain, True, *need, "triton")
        torch.library.opcheck(similarity_gradients, arguments)
    return True


def compiled() -> float:
    """Error of a compiled expression's gradient, whole graph, against the uncompiled one's."""

    def loss(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        with torch.no_grad():
            _, indices = similarity_topk(queries, keys, 2, impl="triton")
        scores = similarity(2 * queries, keys, scale.exp(), impl="triton")
        return scores.logsumexp(1).sum() - scores.gather(1, indices).mean()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in (*raw_features(6, 11, 8), torch.tensor(1.0))]
        found = torch.autograd.grad(function(*leaves), leaves)
        gradients.append(torch.cat([x.ravel() for x in found]))
    return error(gradients[1], gradients[0])


def main() -> None:
    """Everything, as one JSON object on stdout."""
    torch.manual_seed(0)
    kernels.SELECT_ENTRIES = 128  # for time: the interpreter sorts slowly
    report: dict[str, Any] = {"operators": operators(), "compiled": compiled()}
    _poison()
    report["matrices"] = {
        f"{name} {shape} {normalize}": matrices(name, shape, normalize)
        for name in DTYPES
        for shape in SHAPES
        for normalize in (True, False)
    }
    report["autograd"] = {name: through_autograd(dtype) for name, dtype in DTYPES.items()}
    report["zero rows"] = {name: zero_rows(dtype) for name, dtype in DTYPES.items()}
    report["nearest"] = {
        f"{name} {shape} {normalize}": nearest(name, shape, normalize)
        for name in DTYPES
        for shape in TOPK_SHAPES
        for normalize in (True, False)
        if normalize or shape[3] == 5
    }
    report["ties"] = exact_ties()
    report["longest lists"] = longest_lists()
    report["rising"] = falling_and_rising()
    report["odd numbers"] = odd_numbers()
    report["stretches of rows"] = stretches_of_rows()
    report["as on a device"] = as_on_a_device()
    report["chunks alive"] = chunks_alive()
    report["edges"] = edges()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
