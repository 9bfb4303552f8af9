"""Which implementation computes an operator."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from fastclip.kernels import reference, reference_similarity

Impl = Literal["auto", "reference", "triton"]


def choose(impl: str, features: Tensor) -> Literal["reference", "triton"]:
    """The implementation for `features`.

    "auto" is the reference: the Triton kernels are tested in Triton's interpreter and compiled for
    sm_80, sm_90 and sm_100, and become the default on CUDA once they have run on a GPU.

    Raises:
        ValueError: there is no such implementation, or Triton cannot run on these features.
        ImportError: Triton is not installed.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {', '.join(get_args(Impl))}, not {impl!r}")
    if impl != "triton":
        return "reference"
    if importlib.util.find_spec("triton") is None:
        raise ImportError("impl='triton' needs Triton (pip install triton); or use impl='auto'")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not features.is_cuda and not interpreted:
        raise ValueError(
            f"impl='triton' needs CUDA tensors, these are on {features.device}; use impl='auto' "
            "(or TRITON_INTERPRET=1, which is for tests)"
        )
    if features.dtype == torch.float64:
        raise ValueError("impl='triton' takes fp32, bf16 and fp16, not fp64; use impl='auto'")
    return "triton"


def contrastive_module(impl: str, features: Tensor) -> ModuleType:
    """Module with the softmax loss's passes."""
    if choose(impl, features) == "reference":
        return reference
    from fastclip.kernels import contrastive

    return contrastive


def sigmoid_module(impl: str, features: Tensor) -> ModuleType:
    """Module with the sigmoid loss's passes."""
    if choose(impl, features) == "reference":
        return reference
    from fastclip.kernels import sigmoid

    return sigmoid


def similarity_module(impl: str, features: Tensor) -> ModuleType:
    """Module with the similarity matrix and the nearest keys."""
    if choose(impl, features) == "reference":
        return reference_similarity
    from fastclip.kernels import similarity

    return similarity
