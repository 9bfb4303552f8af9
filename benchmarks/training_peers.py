"""Trainings in processes of their own, ours and open_clip's: what they are told, what they report.

Run as a program (``python -m benchmarks.training_peers CONFIGS REPORT SKIPPED ARGUMENT...``) it is
open_clip's trainer with a clock: CONFIGS is a folder of model configurations to make known, REPORT
the JSON file to write, SKIPPED the steps before the clock, and ARGUMENTs are open_clip's own.
"""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from fastclip.config import TrainConfig
from fastclip.models.interop_config import to_open_clip

REPORT = "report.json"

_ERROR = re.compile(r"fastclip: error: |[\w.]*(Error|Exception)\b: ")
"""What the line begins with that names an error; others may follow it."""


FULL_NAMES = {"open_clip": "open_clip_torch", "fastclip": "fastclip-torch"}
NEEDED = ("open_clip_train", "webdataset", "pandas", "torchvision")
INSTALL = "open_clip_torch 'webdataset<=0.2.86' pandas"
"""The versions of open_clip's extra `training`."""


@dataclass(frozen=True)
class Provider:
    """One way to train."""

    name: str

    family: str = "fastclip"
    """fastclip or open_clip."""

    extra: tuple[str, ...] = ()
    """Fields of ours, arguments of open_clip's."""

    equal_time: bool = False
    """Whether it trains for as long as open_clip did, and not for as many steps."""

    by_default: bool = True


PROVIDERS = (
    Provider("fastclip"),
    Provider("open_clip", "open_clip"),
    Provider("open_clip-compiled", "open_clip", ("--torchcompile",)),
    Provider("fastclip-equal-time", equal_time=True),
    Provider("fastclip-compiled", extra=("run.compile=blocks",), by_default=False),
)


@dataclass(frozen=True)
class Training:
    """One training, and where it leaves its files."""

    config: TrainConfig
    """Recipe, model and all numbers; what both trainers have in common is read from here."""

    fields: tuple[str, ...]
    """Overrides of the recipe that lead to `config`."""

    recipe: str
    data: Path
    """Folder with the recipe's data."""

    folder: Path
    """Of checkpoints and numbers; there is nothing in it yet."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        assert self.config.run.steps is not None
        return self.config.run.steps

    @property
    def skipped(self) -> int:
        """First steps, which are not timed: they compile, warm up, wait for the first batches."""
        return skipped_steps(self.steps)


def skipped_steps(steps: int) -> int:
    """A tenth of a run's steps, at least one."""
    return max(1, steps // 10)


@dataclass(frozen=True)
class Figures:
    """What a training reported."""

    steps: int
    """Timed ones."""

    seconds: float
    """They took."""

    first_seconds: float
    """Those before took, compilation and the first batches included."""

    wait_share: float
    """Of `seconds`, spent waiting for batches."""

    mfu: float | None
    memory_gib: float
    final_loss: float | None


def missing() -> list[str]:
    """What open_clip's trainer lacks here."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if record.version_of("webdataset").startswith("1."):
        lacking.append("webdataset before 1.0, which it cannot read with")
    return lacking


def fastclip_command(training: Training, extra: Sequence[str]) -> list[str]:
    """Our trainer, with `extra` fields; evaluations are left to the caller."""
    return [
        sys.executable, "-m", "fastclip", "train", training.recipe, "--data", str(training.data),
        *training.fields, "eval.zero_shot=[]", "eval.retrieval=[]", "run.tensorboard=false",
        f"run.directory={training.folder}", f"run.log_every_steps={training.skipped}", *extra,
    ]  # fmt: skip


def open_clip_command(training: Training, extra: Sequence[str]) -> list[str]:
    """open_clip's trainer on the same shards, with `extra` arguments.

    One epoch of all steps, shards drawn with replacement: of its ways the fastest, since nothing
    is begun anew between epochs, and the one that can fill batches of more pairs than one worker's
    share of so few shards. Crops have the same areas; it varies their aspect as well.
    """
    config = training.config
    optim, run, data = config.optim, config.run, config.data
    models = training.folder / "models"
    models.mkdir(parents=True)
    text = json.dumps(to_open_clip(config.model)["model_cfg"], indent=2)
    (models / "fastclip-benchmark.json").write_text(text, encoding="utf-8")
    shards = sorted(Path(data.train).glob("*.tar"))
    device = "cuda" if run.device == "auto" else run.device
    precision = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}[config.engine.precision]
    values = {
        "model": "fastclip-benchmark", "dataset-type": "webdataset",
        "train-data": "::".join(map(str, shards)),
        "train-num-samples": training.steps * run.global_batch_size,
        "batch-size": run.global_batch_size, "epochs": 1, "workers": data.workers,
        "lr": optim.learning_rate, "beta1": optim.beta1, "beta2": optim.beta2, "eps": optim.eps,
        "wd": optim.weight_decay, "warmup": optim.warmup_steps, "precision": precision,
        "seed": run.seed, "device": device, "logs": training.folder, "name": "run",
        "log-every-n-steps": training.skipped,
    }  # fmt: skip
    if config.engine.gradient_clipping:
        values["grad-clip-norm"] = config.engine.gradient_clipping
    return [
        sys.executable, "-m", "benchmarks.training_peers",
        str(models), str(training.folder / REPORT), str(training.skipped),
        *(f"--{name}={value}" for name, value in values.items()),
        "--image-mean", *map(str, config.model.image_mean),
        "--image-std", *map(str, config.model.image_std),
        "--aug-cfg", f"scale={data.crop_scale}", "--dataset-resampled", *extra,
    ]  # fmt: skip


def run_logged(command: Sequence[str], log: Path, seconds: float) -> None:
    """Run a command from the tree's root, its output into `log`.

    Raises:
        RuntimeError: it failed, with the last error in its output; or took longer than `seconds`.
    """
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command, cwd=record.ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not ready after {seconds:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        said = [line for line in lines if _ERROR.match(line)] or [line for line in lines if line]
        raise RuntimeError(f"exit status {done.returncode}: {said[-1] if said else 'no output'}")


def fastclip_figures(training: Training) -> Figures:
    """From the run's ``metrics.jsonl``: its log windows after the first.

    Raises:
        RuntimeError: there are not two windows, or they end before the last step.
    """
    lines = (training.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    windows = [line for line in map(json.loads, lines) if "step_seconds" in line]
    if len(windows) < 2 or windows[-1]["step"] != training.steps:
        raise RuntimeError(f"the log has {len(windows)} windows and not all steps")
    begins = [0, *(window["step"] for window in windows)]
    counts = [window["step"] - begin for begin, window in zip(begins, windows, strict=False)]
    times = [n * window["step_seconds"] for n, window in zip(counts, windows, strict=True)]

    def mean(name: str) -> float:
        parts = zip(windows[1:], times[1:], strict=True)
        return sum(window[name] * seconds for window, seconds in parts) / sum(times[1:])

    return Figures(
        steps=sum(counts[1:]),
        seconds=sum(times[1:]),
        first_seconds=times[0],
        wait_share=mean("data_wait"),
        mfu=None if windows[-1]["mfu"] is None else mean("mfu"),
        memory_gib=windows[-1]["memory_gib"],
        final_loss=float(windows[-1]["loss"]),
    )


def open_clip_figures(training: Training) -> Figures:
    """From the clock's report, and the last loss in open_clip's own log.

    Raises:
        RuntimeError: it took another number of steps than it was to.
    """
    report = json.loads((training.folder / REPORT).read_text(encoding="utf-8"))
    taken = report.pop("all_steps")
    if taken != training.steps:
        raise RuntimeError(f"open_clip took {taken} steps, not {training.steps}")
    log = (training.folder / "run" / "out.log").read_text(encoding="utf-8")
    losses = re.findall(r"\bLoss: (\S+)", log)
    return Figures(**report, mfu=None, final_loss=float(losses[-1]) if losses else None)


def open_clip_checkpoint(training: Training) -> Path:
    """The weights at its end, among other tensors."""
    return training.folder / "run" / "checkpoints" / "epoch_1.pt"


class TimedBatches:
    """A data loader with a clock: from the end of the first steps to the end of the last one.

    Args:
        loader: with `num_batches`; other attributes are passed through.
        skipped: steps before the clock.
    """

    def __init__(self, loader: Any, skipped: int) -> None:
        self.loader, self.skipped = loader, skipped
        self.steps, self.waited = 0, 0.0
        self._first = self._begin = self._end = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        self._first = time.perf_counter()
        batches = iter(self.loader)
        while True:
            # The step before is issued, and here it ends. More often would slow it down.
            if self.steps == self.skipped:
                self._begin = _synchronised_time()
            elif self.steps == self.loader.num_batches:
                self._end = _synchronised_time()
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if self.steps >= self.skipped:
                self.waited += time.perf_counter() - asked
            self.steps += 1
            yield batch

    def report(self) -> dict[str, Any]:
        """Fields of `Figures`, and `all_steps`."""
        seconds = self._end - self._begin
        cuda = torch.cuda.is_available()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "all_steps": self.steps,
            "steps": self.steps - self.skipped,
            "seconds": seconds,
            "first_seconds": self._begin - self._first,
            "wait_share": min(self.waited / seconds, 1.0),
            "memory_gib": (torch.cuda.max_memory_allocated() if cuda else peak) / 2**30,
        }


def _synchronised_time() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: Sequence[str]) -> int:
    """open_clip's trainer with the clock around its epoch; its exit status."""
    configs, report, skipped, *theirs = arguments
    from benchmarks.torchvision_beside_cpu import declare_operators

    declare_operators()
    import open_clip
    from open_clip_train import main as trainer

    open_clip.add_model_config(Path(configs))
    train_one_epoch = trainer.train_one_epoch

    def timed(model: Any, data: Any, *others: Any, **named: Any) -> Any:
        batches = TimedBatches(data["train"].dataloader, int(skipped))
        data["train"].dataloader = batches
        train_one_epoch(model, data, *others, **named)
        Path(report).write_text(json.dumps(batches.report()), encoding="utf-8")

    trainer.train_one_epoch = timed
    return int(bool(trainer.main(theirs)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
