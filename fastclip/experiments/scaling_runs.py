"""Trainings of an experiment, each in a process of its own: done once, continued when cut off."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastclip.config import TrainConfig, load_config, save_config
from fastclip.data.rewriting import write_text
from fastclip.experiments.scaling_groups import GroupTask, group_error
from fastclip.report.learning_curve import read_metrics

_STOPPED = 75
"""Exit status of ``fastclip train`` that a signal stopped with its state saved."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one training took and gave."""

    seed: int
    seconds: float
    """Of all steps; evaluation and saving left out."""
    errors: dict[str, float]
    """Of each zero-shot task: 1 - top-1, or `group_error`."""
    test_images: dict[str, int]
    """Of each zero-shot task."""
    retrieval: dict[str, float]
    """``task/measure``, as `run_suite` names them."""

    @property
    def mean_error(self) -> float:
        """The plain mean over the zero-shot tasks."""
        return sum(self.errors.values()) / len(self.errors)


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Keep other launches out of `folder`; gives the lock's descriptor, for children to keep too.

    SIGTERM becomes KeyboardInterrupt meanwhile, so that a child is stopped and waited for.

    Raises:
        OSError: another launch, or a child that outlived its own, still trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"another process still trains in {folder}: wait for it, or choose another folder"
            ) from None
        if threading.current_thread() is not threading.main_thread():
            yield lock.fileno()
            return
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield lock.fileno()
        finally:
            signal.signal(signal.SIGTERM, before)


def train_once(config: TrainConfig, groups: GroupTask | None, lock: int) -> Training:
    """Train `config` to its end in its folder by ``fastclip train``, unless that has been done.

    Beside the run's own files the folder has ``recipe.json``, what was asked for; ``train.log``,
    what the process said; and at the end ``result.json``.

    Args:
        groups: a task beside those of `config`, measured once the process has ended.
        lock: from `held`; the process keeps it while it lives.

    Raises:
        ValueError: the folder belongs to a training with other settings.
        InterruptedError: a signal stopped the process; its state is saved.
        ChildProcessError: the process failed.
    """
    folder = Path(config.run.directory)
    folder.mkdir(parents=True, exist_ok=True)
    recipe, result = folder / "recipe.json", folder / "result.json"
    if not recipe.exists():
        save_config(config, recipe)
    elif load_config(recipe) != config:
        raise ValueError(
            f"{recipe} is of a training with other settings: choose another --out, or remove "
            f"{folder}"
        )
    if not result.exists():
        _run_child(recipe, folder / "train.log", lock)
        found = dataclasses.asdict(_read(config, groups))
        write_text(result, json.dumps(found, indent=2) + "\n")
    return Training(**json.loads(result.read_text(encoding="utf-8")))


def _run_child(recipe: Path, log: Path, lock: int) -> None:
    command = [sys.executable, "-m", "fastclip", "train"]
    command += ["fastclip.experiments.scaling_family:recipe", "--data", str(recipe)]
    with log.open("a", encoding="utf-8") as said:
        # In a session of its own, so that Ctrl-C reaches it once, from here.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # it saves at its next log step
            process.wait()
            raise
    if status == _STOPPED:
        raise InterruptedError(
            f"the training in {log.parent} was stopped by a signal; the same command goes on"
        )
    if status != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing"]
        told = [line for line in lines if line.startswith("fastclip: error: ")] or lines
        raise ChildProcessError(
            f"the training in {log.parent} ended with status {status}; {log.name} says: "
            f"{told[-1].removeprefix('fastclip: error: ')}"
        )


def _read(config: TrainConfig, groups: GroupTask | None) -> Training:
    """The last evaluation and the time of the steps, from the run's metrics."""
    rows = read_metrics(Path(config.run.directory) / "metrics.jsonl")
    seconds, done = 0.0, 0
    evaluation: dict[str, float] = {}
    for row in rows:
        if "step_seconds" in row:
            seconds += row["step_seconds"] * (row["step"] - done)
            done = row["step"]
        if row["step"] == config.run.steps:
            evaluation |= {
                name.removeprefix("eval/"): value
                for name, value in row.items()
                if name.startswith("eval/")
            }
    if not evaluation:
        raise ValueError(
            f"{config.run.directory} has no evaluation of its last step in metrics.jsonl: remove "
            "it to train anew"
        )
    names = [task.name for task in config.eval.zero_shot]
    errors = {name: 1 - evaluation[f"zero_shot/{name}/top1"] for name in names}
    images = {name: int(evaluation[f"zero_shot/{name}/images"]) for name in names}
    if groups is not None:
        errors[groups.name], images[groups.name] = group_error(
            Path(config.run.directory),
            groups,
            batch_size=config.eval.batch_size,
            workers=config.eval.workers,
        )
    return Training(
        seed=config.run.seed,
        seconds=seconds,
        errors=errors,
        test_images=images,
        retrieval={
            name.removeprefix("retrieval/"): value
            for name, value in evaluation.items()
            if name.startswith("retrieval/")
        },
    )
