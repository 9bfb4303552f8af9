"""The folders of a run's checkpoints: their names, and which of them stay."""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fastclip.data.rewriting import write_text
from fastclip.distributed.collectives import barrier, broadcast_object
from fastclip.distributed.runtime import Runtime

logger = logging.getLogger("fastclip")

_STEP_NAME = re.compile(r"step-(\d{8})")


def step_tag(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def complete_checkpoints(directory: Path) -> list[str]:
    """Names of the complete checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if _STEP_NAME.fullmatch(p.name)]
    return sorted(n for n in names if (directory / n / "fastclip.json").is_file())


def flush(directory: Path) -> None:
    """Let a folder's files reach the disk: a name must not outlive a power cut without them."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_way(directory: Path, tag: str) -> None:
    """Take away what a new checkpoint `tag` must not be found beside.

    That is an earlier one of the same name, with its conversion, and, put aside, later ones: of a
    run that this one has begun anew in place of. Before the new one appears, so that a kill in
    between cannot leave them together.
    """
    for stale in (directory / f"{tag}-universal", directory / tag):
        shutil.rmtree(stale, ignore_errors=True)
    for later in complete_checkpoints(directory):
        if later > tag:
            _rename(directory, later, "superseded")


def set_aside(directory: Path, tag: str, runtime: Runtime) -> Path:
    """Keep a checkpoint under a name that nothing resumes from. Collective.

    Returns:
        The new name, for `put_back`.
    """
    kept = None
    if runtime.is_main:
        shutil.rmtree(directory / f"{tag}-universal", ignore_errors=True)
        kept = _rename(directory, tag, "diverged")
        _point_at_newest(directory)
    return broadcast_object(kept)


def put_back(paths: Sequence[Path], runtime: Runtime) -> None:
    """Undo `set_aside`. Collective."""
    if runtime.is_main:
        for path in paths:
            found = _STEP_NAME.search(path.name)
            assert found is not None
            os.replace(path, path.with_name(found[0]))
            _point_at_newest(path.parent)
    barrier()


def _point_at_newest(directory: Path) -> None:
    for newest in complete_checkpoints(directory)[-1:]:
        write_text(directory / "latest", newest + "\n")


def _rename(directory: Path, tag: str, reason: str) -> Path:
    aside = (directory / f".{reason}-{tag}-{n}" for n in itertools.count(1))
    kept = next(path for path in aside if not path.exists())
    os.replace(directory / tag, kept)
    logger.warning("%s is kept as %s, and nothing reads it again", directory / tag, kept.name)
    return kept


def prune(directory: Path, keep: int | None) -> None:
    """Leave the newest `keep` checkpoints, and conversions of these alone."""
    if keep is None:
        return
    complete = complete_checkpoints(directory)
    for old in complete[:-keep]:
        shutil.rmtree(directory / old)
    for conversion in directory.glob("step-*-universal"):
        if conversion.name.removesuffix("-universal") not in complete[-keep:]:
            shutil.rmtree(conversion)
