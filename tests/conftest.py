"""What every test shares: seeds, the `gpu` skip, quiet threads, peers that import on a CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# The multi-process tests run several ranks on a few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from benchmarks.torchvision_beside_cpu import declare_operators

declare_operators()


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


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """The command line sets up the logger, for good, and on a stream that ends with its test."""
    logger = logging.getLogger("fastclip")
    yield
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
