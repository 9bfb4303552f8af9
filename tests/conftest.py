"""What every test shares: seeds, the `gpu` skip, quiet threads, peers that import on a CPU."""

from __future__ import annotations

import os

# The multi-process tests run several ranks on a few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

_TORCHVISION_OPS: torch.library.Library | None = None


def _declare_torchvision_operators() -> None:
    """Let torchvision's CUDA wheel import beside a CPU build of torch.

    Its Python side registers meta kernels for operators that its (unloadable) C++ library would
    define. Declaring the two schemas is enough for open_clip, timm and transformers to import.
    """
    global _TORCHVISION_OPS
    if torch.cuda._is_compiled():
        return
    _TORCHVISION_OPS = torch.library.Library("torchvision", "FRAGMENT")  # must outlive the session
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            _TORCHVISION_OPS.define(schema)


_declare_torchvision_operators()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
