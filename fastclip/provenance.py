"""Where a number comes from: commit, date, machine, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastclip import __version__

LAUNCHES = "launches.jsonl"
"""In a run's folder: a line for each time it was begun or gone on with."""

_GIT_SECONDS = 10
_STATED_VERSIONS = ("triton", "deepspeed", "numpy", "pillow", "simplejpeg")


def provenance() -> dict[str, Any]:
    """Of what is computed now: ``commit`` (see there), ``date``, ``machine``, ``versions``."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> str:
    """This one, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


def versions() -> dict[str, str]:
    """Of the packages that a run's numbers and speed may depend on, as far as installed."""
    found = {"fastclip": __version__, "python": platform.python_version()}
    # torch says what it was built for ("2.11.0+cu130"), which its distribution may not.
    found["torch"] = str(torch.__version__)
    for name in _STATED_VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit that a package's folder is checked out from, with "+" where its files differ.

    Kernels and C++ sources beside the folder count as its files. None without git, and where the
    folder is none of the repository's around it, as that of an installed package is.
    """
    if git(folder, "ls-files", "--error-unmatch", "--", "__init__.py") is None:
        return None
    sources = [".", *(path for path in ("../kernels", "../csrc") if (folder / path).is_dir())]
    head = git(folder, "rev-parse", "HEAD")
    changes = git(folder, "status", "--porcelain", "--untracked-files=normal", "--", *sources)
    if head is None or changes is None:
        return None
    return head + ("+" if changes else "")


def short(commit: str | None) -> str:
    """A commit as it is shown: ten digits, "+" where files differ from it; "unknown" for None."""
    return "unknown" if commit is None else commit[:10] + "+" * commit.endswith("+")


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints in a folder; None where it fails, takes long or is not there.

    The variables by which git tells its hooks of another repository are not passed on, no hook of
    this one is run, and nothing is written.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name == "GIT_CEILING_DIRECTORIES"
    }
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder)]
    try:
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def note_launch(folder: Path, **about: Any) -> None:
    """Add a line to a run's ``launches.jsonl``: ``begin``, `about`, commit, machine, versions."""
    found = provenance()
    launch = {"begin": found.pop("date"), **about, **found}
    with (folder / LAUNCHES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(launch) + "\n")


def launch_commits(folders: Iterable[Path]) -> list[str]:
    """The commits that runs were launched at, each once; "unknown" where one does not say."""
    found = set()
    for folder in folders:
        path = folder / LAUNCHES
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ["{}"]
        found |= {json.loads(line).get("commit") or "unknown" for line in lines}
    return sorted(found)
