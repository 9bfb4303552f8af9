"""Cosine similarity of two feature sets, whole or each query's nearest keys, as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.kernels.reference import compute_dtype
from fastclip.kernels.reference_similarity import MAX_K
from fastclip.ops.dispatch import Impl, similarity_module

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def similarity(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float = 1.0,
    *,
    normalize: bool = True,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Scaled similarities of all queries with all keys; differentiable, once.

    Entry (i, j) is scale·⟨q_i, k_j⟩ / (‖q_i‖·‖k_j‖), norms below 1e-12 counting as 1e-12 as in
    `F.normalize`: the similarity of a zero row is zero. Whatever the features' dtype, and also
    under autocast, products are summed in fp32 (IEEE for fp32 features; fp64 for fp64), and norms
    and scale are applied to them in that dtype. No normalised features are stored.

    Args:
        queries: [M, D], fp32, bf16, fp16 or fp64; M may be 0.
        keys: [N, D], the same dtype and device.
        scale: multiplies the similarities; [] or [1] on the features' device, or a number.
        normalize: divide by the norms; False for features that are of unit length already.
        out_dtype: dtype of the result; None: fp32 (fp64 for fp64 features).
        impl: what computes it: "reference" (PyTorch), "triton", or "auto" (see `choose`).

    Returns:
        [M, N] in `out_dtype`. Gradients reach queries, keys and scale.

    Raises:
        TypeError, ValueError: an argument does not fit, or `impl` cannot take these features.
        RuntimeError: in a backward pass that is itself to be differentiated.
    """
    _check_features(queries, keys)
    out_dtype = compute_dtype(queries.dtype) if out_dtype is None else out_dtype
    if out_dtype not in _DTYPES:
        raise TypeError(f"out_dtype is {_names()}, not {out_dtype}")
    if not isinstance(scale, Tensor):
        dtype = compute_dtype(queries.dtype)
        # A fill, not a copy from the host, which a CUDA graph could not capture.
        scale = torch.full((), float(scale), dtype=dtype, device=queries.device)
    elif scale.shape not in ((), (1,)):
        raise ValueError(f"scale is one number, of shape [] or [1], not {list(scale.shape)}")
    elif not scale.is_floating_point():
        raise TypeError(f"scale is a floating point number, not {scale.dtype}; use scale.float()")
    elif scale.device != queries.device:
        raise ValueError(f"scale is on {scale.device}, the features on {queries.device}")
    return similarity_matrix(queries, keys, scale, normalize, out_dtype, impl)


def similarity_topk(
    queries: Tensor, keys: Tensor, k: int, *, normalize: bool = True, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of each query, without the matrix; deterministic, not differentiable.

    Similarities are those of `similarity` with scale 1. Their order is a stable descending
    sort's: equal ones by ascending index, and not-a-number before all numbers, as `torch.sort` has
    it, so that broken features show.

    Args:
        queries: [M, D], fp32, bf16, fp16 or fp64; M may be 0.
        keys: [N, D], the same dtype and device; N < 2³¹.
        k: from 1 to min(N, 1024).
        normalize: divide by the norms; False for features that are of unit length already.
        impl: what computes it: "reference" (PyTorch), "triton", or "auto" (see `choose`).

    Returns:
        values: fp32 [M, k] (fp64 for fp64 features), falling.
        indices: int64 [M, k], rows of `keys`.

    Raises:
        TypeError, ValueError: an argument does not fit, or `impl` cannot take these features.
        RuntimeError: in a backward pass through the values.
    """
    _check_features(queries, keys)
    count = keys.shape[0]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is an int, not {type(k).__name__}")
    if not 1 <= k <= min(count, MAX_K):
        way_out = (
            "; for more, sort the rows of similarity(queries, keys)" if MAX_K < k <= count else ""
        )
        raise ValueError(
            f"k is from 1 to {min(count, MAX_K)} (no more than {MAX_K}, nor than the {count} "
            f"keys), not {k}{way_out}"
        )
    if count >= 2**31:
        raise ValueError(f"keys are fewer than 2³¹, not {count}; search them in parts")
    return similarity_neighbours(queries, keys, k, normalize, impl)


@torch.library.custom_op("fastclip::similarity_matrix", mutates_args=())
def similarity_matrix(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    normalize: bool,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """`similarity` without its checks."""
    with torch.autocast(queries.device.type, enabled=False), torch.cuda.device_of(queries):
        return similarity_module(impl, queries).similarity(
            queries, keys, scale, normalize=normalize, out_dtype=out_dtype
        )


@similarity_matrix.register_fake
def _(queries, keys, scale, normalize, out_dtype, impl):
    del scale, normalize, impl
    return queries.new_empty((queries.shape[0], keys.shape[0]), dtype=out_dtype)


@torch.library.custom_op("fastclip::similarity_gradients", mutates_args=())
def similarity_gradients(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    normalize: bool,
    need_queries: bool,
    need_keys: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_queries [M, D] or [0], d_keys [N, D] or [0], d_scale []), in compute dtype."""
    with torch.autocast(queries.device.type, enabled=False), torch.cuda.device_of(queries):
        gradients = similarity_module(impl, queries).similarity_gradients(
            gradient,
            queries,
            keys,
            scale,
            normalize=normalize,
            need_queries=need_queries,
            need_keys=need_keys,
        )
    empty = gradients.d_scale.new_empty(0)
    d_queries = gradients.d_queries if gradients.d_queries is not None else empty
    d_keys = gradients.d_keys if gradients.d_keys is not None else empty.clone()
    return d_queries, d_keys, gradients.d_scale


@similarity_gradients.register_fake
def _(gradient, queries, keys, scale, normalize, need_queries, need_keys, impl):
    del gradient, scale, normalize, impl
    dtype = compute_dtype(queries.dtype)
    return (
        queries.new_empty(queries.shape if need_queries else 0, dtype=dtype),
        keys.new_empty(keys.shape if need_keys else 0, dtype=dtype),
        queries.new_empty((), dtype=dtype),
    )


@torch.library.custom_op("fastclip::similarity_neighbours", mutates_args=())
def similarity_neighbours(
    queries: Tensor, keys: Tensor, k: int, normalize: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """`similarity_topk` without its checks."""
    with torch.autocast(queries.device.type, enabled=False), torch.cuda.device_of(queries):
        module = similarity_module(impl, queries)
        return tuple(module.similarity_topk(queries, keys, k, normalize=normalize))


@similarity_neighbours.register_fake
def _(queries, keys, k, normalize, impl):
    del keys, normalize, impl
    shape = (queries.shape[0], k)
    return (
        queries.new_empty(shape, dtype=compute_dtype(queries.dtype)),
        queries.new_empty(shape, dtype=torch.int64),
    )


def _save(ctx, inputs, output) -> None:
    del output
    queries, keys, scale, ctx.normalize, _, ctx.impl = inputs
    ctx.save_for_backward(queries, keys, scale)


def _backward(ctx, gradient):
    queries, keys, scale = ctx.saved_tensors
    need_queries, need_keys, need_scale = ctx.needs_input_grad[:3]
    d_queries, d_keys, d_scale = similarity_gradients(
        gradient, queries, keys, scale, ctx.normalize, need_queries, need_keys, ctx.impl
    )
    return (
        d_queries.to(queries.dtype) if need_queries else None,
        d_keys.to(keys.dtype) if need_keys else None,
        d_scale.to(scale.dtype).reshape(scale.shape) if need_scale else None,
        None,
        None,
        None,
    )


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError(
        "similarity has no second derivative: call backward or grad without create_graph=True"
    )


def _no_derivative(ctx, *gradients):
    raise RuntimeError(
        "similarity_topk is not differentiable: give it detached features, and multiply queries "
        "with keys[indices], which is"
    )


similarity_matrix.register_autograd(_backward, setup_context=_save)
similarity_gradients.register_autograd(_no_second_derivative)
similarity_neighbours.register_autograd(_no_derivative)


def _check_features(queries: Tensor, keys: Tensor) -> None:
    for name, features in (("queries", queries), ("keys", keys)):
        if features.ndim != 2:
            raise ValueError(f"{name} are [rows, dims], not {list(features.shape)}")
        if features.dtype not in _DTYPES:
            raise TypeError(f"{name} are {_names()}, not {features.dtype}; use {name}.float()")
    if keys.shape[0] == 0:
        raise ValueError("keys are empty: there is nothing to compare the queries with")
    if queries.shape[1] != keys.shape[1] or keys.shape[1] == 0:
        raise ValueError(
            f"queries and keys have one number of dimensions, at least 1; got "
            f"{list(queries.shape)} and {list(keys.shape)}"
        )
    if queries.dtype != keys.dtype:
        raise TypeError(
            f"queries and keys have one dtype; got {queries.dtype} and {keys.dtype}: convert one"
        )
    if queries.device != keys.device:
        raise ValueError(
            f"queries and keys are on one device; got {queries.device} and {keys.device}: move one"
        )


def _names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
