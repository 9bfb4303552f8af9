"""NVIDIA's apex, where it is built: the sole importer of it.

It is on no registry (the package of that name on PyPI is another one); its compiled module tells.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ADVICE = (
    "needs NVIDIA's apex built with its CUDA extensions (github.com/NVIDIA/apex; the package of "
    "that name on PyPI is another one)"
)


def find_optimizer(name: str) -> Any | None:
    """apex's optimiser of that name (FusedAdam, FusedLAMB), None where apex is not built."""
    try:
        importlib.import_module("amp_C")
        return getattr(importlib.import_module("apex.optimizers"), name)
    except (ImportError, AttributeError):
        return None


def find_layer_norm() -> Callable[..., Tensor] | None:
    """apex's fused layer normalisation with the arguments of torch's; None where not built."""
    try:
        importlib.import_module("fused_layer_norm_cuda")
        module = importlib.import_module("apex.normalization.fused_layer_norm")
        fused = module.fused_layer_norm_affine
    except (ImportError, AttributeError):
        return None

    def layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # it would cast x down
            return fused(x, weight, bias, shape, eps)

    return layer_norm
