"""A run's folder belongs to one launch at a time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from fastclip.distributed.collectives import broadcast_object
from fastclip.distributed.runtime import Runtime

logger = logging.getLogger("fastclip")

_LOCK = ".lock"


@contextlib.contextmanager
def alone_in(directory: str | Path, runtime: Runtime) -> Iterator[None]:
    """Hold a run's folder while the block runs; the lock ends with the process. Collective.

    The folder is made, and taken away again if nothing is written into it. On file systems without
    locks nothing is checked.

    Raises:
        ValueError: another process holds it, or it cannot be written; on every rank.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if runtime.is_main:
            try:
                _hold(Path(directory), held)
            except BlockingIOError:
                problem = (
                    f"another process trains in {directory}: wait for its end, or choose another "
                    "run.directory (a killed launcher may have left its ranks behind)"
                )
            except OSError as error:
                problem = f"run.directory={directory} cannot be written: {error.strerror}"
        problem = broadcast_object(problem)
        if problem is not None:
            raise ValueError(problem)
        yield


def _hold(directory: Path, held: contextlib.ExitStack) -> None:
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    if new:
        held.callback(_remove_unused, directory)
    file = held.enter_context((directory / _LOCK).open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # a file system without locks
        logger.info("%s is not locked: %s", directory, error.strerror)


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
