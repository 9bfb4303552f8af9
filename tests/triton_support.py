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
    BEFORE_3_7 = False


def skip_without_interpreter() -> None:
    """For tests that run kernels on the CPU."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if BEFORE_3_7 and _release(np.__version__) >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} does not work with NumPy "
            f"{np.__version__}: it needs Triton 3.7, or NumPy before 2.4"
        )
