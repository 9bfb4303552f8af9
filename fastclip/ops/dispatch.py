"""Which implementation computes an operator."""

from __future__ import annotations

import importlib.util
import logging
import os
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from fastclip.kernels import reference, reference_optim, reference_similarity

logger = logging.getLogger("fastclip")

Impl = Literal["auto", "reference", "triton"]

_said: set[str] = set()


def choose(impl: str, features: Tensor) -> Literal["reference", "triton"]:
    """The implementation for `features`.

    "auto" is Triton for CUDA tensors and the reference for others. Where Triton cannot be had for a
    CUDA tensor, the reference takes its place and the log says so once.

    Raises:
        ValueError: there is no such implementation, or Triton cannot run on these features.
        ImportError: Triton was asked for and is not installed.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {', '.join(get_args(Impl))}, not {impl!r}")
    if impl == "reference" or (impl == "auto" and not features.is_cuda):
        return "reference"
    problem = _problem(features)
    if problem is None:
        return "triton"
    if impl == "auto":
        _say_once(f"plain PyTorch takes Triton's place, which is slower on a GPU: {problem}")
        return "reference"
    raise problem


def _problem(features: Tensor) -> Exception | None:
    """Why Triton cannot run on these features."""
    if importlib.util.find_spec("triton") is None:
        return ImportError("impl='triton' needs Triton (pip install triton); or use impl='auto'")
    if features.dtype == torch.float64:
        return ValueError("impl='triton' takes fp32, bf16 and fp16, not fp64; use impl='auto'")
    if not features.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return ValueError(
            f"impl='triton' needs CUDA tensors, these are on {features.device}; use impl='auto' "
            "(or TRITON_INTERPRET=1, which is for tests)"
        )
    if features.is_cuda and torch.cuda.get_device_capability(features.device) < (8, 0):
        name = torch.cuda.get_device_name(features.device)
        return ValueError(f"impl='triton' needs an Ampere GPU or newer (sm_80), not {name}")
    return None


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning("%s", message)


def pairs_module(impl: str, features: Tensor) -> ModuleType:
    """Module with what concerns each pair alone."""
    if choose(impl, features) == "reference":
        return reference
    from fastclip.kernels import pairs

    return pairs


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


def optim_module(impl: str, parameter: Tensor) -> ModuleType:
    """Module with the update of compact weights."""
    if choose(impl, parameter) == "reference":
        return reference_optim
    from fastclip.kernels import compact_adamw

    return compact_adamw
