"""A run's folder belongs to one launch at a time."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from fastclip.distributed.collectives import broadcast_object
from fastclip.distributed.runtime import Runtime

_LOCK = ".lock"


@contextlib.contextmanager
def alone_in(directory: str | Path, runtime: Runtime) -> Iterator[None]:
    """Hold a run's folder while the block runs; the lock ends with the process. Collective.

    The folder is made, and taken away again if nothing is written into it. On file systems without
    locks nothing is checked.

    Raises:
        ValueError: another process holds it, on every rank.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if runtime.is_main:
            if not Path(directory).exists():
                held.callback(_remove_unused, Path(directory))
            Path(directory).mkdir(parents=True, exist_ok=True)
            file = held.enter_context((Path(directory) / _LOCK).open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = (
                    f"another process trains in {directory}: wait for its end, or choose another "
                    "run.directory (a killed launcher may have left its ranks behind)"
                )
            except OSError:
                pass
        problem = broadcast_object(problem)
        if problem is not None:
            raise ValueError(problem)
        yield


def _remove_unused(directory: Path) -> None:
    if [path.name for path in directory.iterdir()] == [_LOCK]:
        (directory / _LOCK).unlink()
        directory.rmdir()


def check_fresh(directory: Path, what: str, runtime: Runtime) -> None:
    """Refuse a folder in which there is a run already. Collective.

    Raises:
        ValueError: there is, on every rank.
    """
    problem = None
    if runtime.is_main:
        for name in ("checkpoints", "metrics.jsonl"):
            path = directory / name
            if path.exists() and path.stat().st_size:
                problem = f"{directory} holds a run ({name}): give {what} another folder"
    problem = broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)
