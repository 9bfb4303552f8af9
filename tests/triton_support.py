"""What the installed Triton can do, for tests that would otherwise blame our kernels."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


try:
    BEFORE_3_7 = _release(importlib.metadata.version("triton")) < (3, 7)
except importlib.metadata.PackageNotFoundError:
    BEFORE_3_7 = False  # and the tests are skipped for that

needs_interpreter = pytest.mark.skipif(
    BEFORE_3_7 and _release(np.__version__) >= (2, 4),
    reason="Triton's interpreter before 3.7 does not run with NumPy 2.4 and newer",
)
"""For tests that run kernels on the CPU."""
