"""Lets torchvision's CUDA wheel import beside a CPU build of torch."""

from __future__ import annotations

import torch

_OPERATORS: torch.library.Library | None = None


def declare_operators() -> None:
    """Declare two operators, which is enough for open_clip, timm and transformers to import.

    torchvision's Python side registers meta kernels for operators that its (unloadable) C++ library
    would define.
    """
    global _OPERATORS
    if torch.cuda._is_compiled():
        return
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # must outlive the process
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            _OPERATORS.define(schema)
