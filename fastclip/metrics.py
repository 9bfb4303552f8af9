"""What a run reports: throughput over synchronised windows, and where the numbers go."""

from __future__ import annotations

import itertools
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastclip.flops import peak_flops
from fastclip.provenance import note_launch

logger = logging.getLogger("fastclip")


class Throughput:
    """Samples per second and model FLOPs utilisation, with evaluation and saving left out.

    The device is synchronised at the edges of a window only, so that a window measures work done
    and steps inside it run ahead freely.

    Args:
        device: of the towers.
        precision: "fp32", "bf16" or "fp16", for the device's peak.
        global_batch_size: pairs of all ranks in a step.
        world_size: ranks that share the work.
    """

    def __init__(
        self, device: torch.device, precision: str, global_batch_size: int, world_size: int
    ) -> None:
        self.device = device
        self.global_batch_size = global_batch_size
        peak = peak_flops(device, precision)
        self.peak = None if peak is None else peak * world_size
        self.start(0.0)

    def start(self, wait_seconds: float) -> None:
        """Begin a window; `wait_seconds` is the loader's counter."""
        self._synchronise()
        self._begin = time.perf_counter()
        self._excluded = 0.0
        self._steps = 0
        self._flops = 0.0
        self._waited = wait_seconds

    def step(self, flops_per_sample: float) -> None:
        """Count one step; `flops_per_sample` is its useful work per pair."""
        self._steps += 1
        self._flops += flops_per_sample * self.global_batch_size

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the window."""
        self._synchronise()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._synchronise()
            self._excluded += time.perf_counter() - begin

    def window(self, wait_seconds: float) -> dict[str, float | None]:
        """Figures of the window that ends now; the next one begins.

        ``data_wait`` is the share of the time in which the step waited for the loader; ``mfu`` is
        None where the device's peak is not known; ``memory_gib`` is the peak so far.
        """
        self._synchronise()
        seconds = max(time.perf_counter() - self._begin - self._excluded, 1e-9)
        steps = max(self._steps, 1)
        figures: dict[str, float | None] = {
            "samples_per_second": self._steps * self.global_batch_size / seconds,
            "step_seconds": seconds / steps,
            "data_wait": min((wait_seconds - self._waited) / seconds, 1.0),
            "mfu": None if self.peak is None else self._flops / seconds / self.peak,
            "memory_gib": peak_memory(self.device) / 2**30,
        }
        self.start(wait_seconds)
        return figures

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: torch's on a CUDA device, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class RunLogger:
    """Writes a run's numbers: ``metrics.jsonl``, TensorBoard, W&B when asked, and the terminal.

    ``launches.jsonl`` says of each launch when, where and with which commit and versions it began.

    Numbers in the JSONL file round-trip to the bit. A number that is not finite is written as the
    text "inf", "-inf" or "nan", which every JSON reader accepts. All methods do nothing on ranks
    other than the main one.

    Args:
        directory: the run's folder.
        is_main: whether this rank writes.
        total_steps: of the run, for the time that is left.
        resume_at: steps that count; lines of later ones, from a launch that died, are cut off. With
            0, those of an earlier run are put aside.
        tensorboard: write TensorBoard events.
        wandb_project: also log to this W&B project.
    """

    def __init__(
        self,
        directory: Path,
        *,
        is_main: bool,
        total_steps: int,
        resume_at: int = 0,
        tensorboard: bool = True,
        wandb_project: str | None = None,
    ) -> None:
        self.is_main = is_main
        self.total_steps = total_steps
        if not is_main:
            return
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        if resume_at:
            cut_back(path, resume_at)
        else:
            _set_aside(path)
        self._evaluated = _evaluated_steps(path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _open_tensorboard(directory, resume_at) if tensorboard else None
        self._wandb = None if wandb_project is None else _open_wandb(wandb_project, directory)
        self._progress = _Progress(total_steps, resume_at) if sys.stderr.isatty() else None
        self._first_step = resume_at
        self._begin = time.monotonic()

    def start(self, description: str) -> None:
        """Say what is about to run; ``launches.jsonl`` keeps it; see `note_launch`."""
        if not self.is_main:
            return
        logger.info("%s", description)
        note_launch(self.directory, step=self._first_step, description=description)

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Log a training step; tensors are read from the device here and not before."""
        if not self.is_main:
            return
        plain = {name: _number(value) for name, value in values.items()}
        self._write(step, plain)
        line = self._line(step, plain)
        if self._progress is not None:
            self._progress.update(step, line)
        else:
            logger.info("%s", line)

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier launch has logged an evaluation at this step; False off rank 0."""
        return self.is_main and step in self._evaluated

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log an evaluation; names are prefixed with ``eval/``."""
        if self.is_main:
            self._write(step, {f"eval/{name}": value for name, value in metrics.items()})

    def end(self, report: Mapping[str, int]) -> None:
        """Close everything; `report` counts the samples that were left out."""
        if not self.is_main:
            return
        if self._progress is not None:
            self._progress.close()
        if report:
            counts = ", ".join(f"{count} {kind}" for kind, count in report.items())
            logger.info("samples left out: %s", counts)
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        readable = {name: _json(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **readable}, allow_nan=False) + "\n")
        self._file.flush()
        known = {name: value for name, value in values.items() if value is not None}
        if self._board is not None:
            for name, value in known.items():
                self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def _line(self, step: int, values: Mapping[str, float | None]) -> str:
        def shown(name: str, pattern: str, absent: str = "n/a") -> str:
            value = values.get(name)
            return absent if value is None else pattern.format(value)

        done = max(step - self._first_step, 1)
        left = (time.monotonic() - self._begin) / done * (self.total_steps - step)
        parts = [
            f"step {step}/{self.total_steps}",
            f"epoch {shown('epoch', '{:.2f}')}",
            f"loss {shown('loss', '{:.4f}')}",
            f"scale {shown('logit_scale', '{:.2f}')}",
            f"grad {shown('gradient_norm', '{:.3g}')}",
            f"lr {shown('learning_rate', '{:.2e}')}",
            f"{shown('samples_per_second', '{:,.0f}')} pairs/s",
            f"data wait {shown('data_wait', '{:.0%}')}",
            f"MFU {shown('mfu', '{:.1%}')}",
            f"mem {shown('memory_gib', '{:.2f}')} GiB",
            f"ETA {duration(left)}",
        ]
        if values.get("update_applied") == 0.0:
            norm = values.get("gradient_norm")
            reason = "not finite" if norm is None or math.isinf(norm) else "unusually large"
            parts.append(f"UPDATE SKIPPED (gradient {reason})")
        return " | ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _set_aside(path: Path) -> None:
    """What an earlier run in the same folder has logged is kept under another name."""
    if path.exists() and path.stat().st_size:
        names = (path.with_name(f".superseded-{n}-{path.name}") for n in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def _evaluated_steps(path: Path) -> set[int]:
    if not path.exists():
        return set()
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["step"] for row in rows if any(name.startswith("eval/") for name in row)}


def cut_back(path: Path, step: int) -> None:
    """Drop lines of later steps, and a torn last line, from a metrics file."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _within(line, step)]
    scratch = path.with_suffix(".partial")
    scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    scratch.replace(path)


def _within(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _open_tensorboard(directory: Path, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning(
            "no TensorBoard events: pip install tensorboard, or set run.tensorboard=false"
        )
        return None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step + 1)


def _open_wandb(project: str, directory: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            "run.wandb_project needs Weights & Biases: pip install wandb, or set it to none"
        ) from None
    return wandb.init(project=project, dir=str(directory), name=directory.name, resume="allow")


class _Progress:
    """One line on a terminal that is rewritten at every log step."""

    def __init__(self, total_steps: int, done: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            BarColumn(bar_width=24), TextColumn("{task.description}"), transient=False
        )
        self._task = self._bar.add_task("", total=total_steps, completed=done)
        self._bar.start()

    def update(self, step: int, line: str) -> None:
        self._bar.update(self._task, completed=step, description=line)

    def close(self) -> None:
        self._bar.stop()
