"""What rewriting shards into another folder needs: one run at a time, whole files, safe names."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from fastclip.data.decode import BadSampleError


def begin(work: Path, out: Path, settings: dict[str, Any], inputs: list[str]) -> None:
    """Make the folder `work` of the output `out`, or see that it was begun with the same job.

    Args:
        settings: of the job, plain data.
        inputs: a line on each shard that is read.

    Raises:
        ValueError: it was begun otherwise, or holds shards that were not begun at all.
    """
    path = work / "settings.json"
    if path.is_file():
        then = json.loads(path.read_bytes())
        differ = [
            f"{name} was {then['settings'].get(name)}, now {value}"
            for name, value in settings.items()
            if then["settings"].get(name) != value
        ]
        if len(then["inputs"]) != len(inputs):
            differ.append(f"shards were {len(then['inputs'])}, now {len(inputs)}")
        changed = [(a, b) for a, b in zip(then["inputs"], inputs, strict=False) if a != b]
        differ += [f"a shard was {a}, now {b}" for a, b in changed[:1]]
        if differ:
            raise ValueError(
                f"{out} was begun otherwise: {'; '.join(differ)}. Name another output folder, or "
                "delete this one"
            )
        return
    if next(out.glob("*.tar"), None) is not None:
        raise ValueError(f"{out} holds shards of something else: name an empty output folder")
    work.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"settings": settings, "inputs": inputs}, indent=1).encode()
    write_whole(path, lambda file: file.write(content))


@contextmanager
def alone(work: Path, out: Path, doing: str) -> Iterator[None]:
    """Hold the lock in the folder `work` of the output `out`.

    Raises:
        ValueError: another process holds it.
    """
    with (work / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is {doing} into {out}: wait for it") from None
        yield


def end_with_parent() -> None:
    """Let this worker process end when the one that started it does.

    A killed parent's lock is free: the next run must not meet its workers at their files.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, who ends this one
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that is there when it is complete, and not before."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text."""
    write_whole(path, lambda file: file.write(text.encode()))


def check_target(path: Path, *suffixes: str) -> None:
    """See that a file can be written there later, after what may take hours; makes its folder.

    Raises:
        ValueError: it is a folder, or has none of the suffixes.
        OSError: it cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path} is written as {' or '.join(suffixes)}: end its name so")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # no name: every rank may look at once
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None


def is_unsafe(key: str) -> bool:
    """Whether files of that name would leave the folder they are unpacked in, or end before it."""
    return key.startswith("/") or ".." in key.split("/") or "\0" in key


@contextmanager
def stopping() -> Iterator[None]:
    """A shard that cannot be read is no fault of its pairs': the run stops, and can go on later."""
    try:
        yield
    except BadSampleError as error:
        raise ValueError(str(error)) from None
