"""Where a number comes from: commit, date, machine, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastclip import __version__

_STATED_VERSIONS = ("torch", "triton", "deepspeed", "numpy", "pillow", "simplejpeg")


def provenance() -> dict[str, Any]:
    """Of what is computed now: ``commit`` (see there), ``date``, ``machine``, ``versions``."""
    return {
        "commit": commit(),
        "date": now(),
        "machine": machine(),
        "versions": versions(),
    }


def now() -> str:
    """The time in UTC, as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> str:
    """This one, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


def versions() -> dict[str, str]:
    """Of the packages that a run's numbers and speed may depend on, as far as installed."""
    found = {"fastclip": __version__, "python": platform.python_version()}
    for name in _STATED_VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit that a package's folder is checked out from, with "+" where its files differ.

    None without git, and where the files are none of the repository's around them, as those of an
    installed package are.
    """
    if _git(folder, "ls-files", "--error-unmatch", "--", "__init__.py") is None:
        return None
    head, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", ".")
    if head is None or changes is None:
        return None
    return head + ("+" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
