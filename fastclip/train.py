"""The training loop: next batch, one step, and when to log, save, evaluate and stop."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from fastclip.checkpoint import save_checkpoint
from fastclip.config import TrainConfig, to_dict
from fastclip.distributed.collectives import any_rank
from fastclip.distributed.runtime import Runtime, initialise, shutdown
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.suite import format_table, run_suite
from fastclip.run import Run
from fastclip.train_step import StepResult

logger = logging.getLogger("fastclip")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Optimiser steps done, over all launches of this run."""

    finished: bool
    """False when a signal stopped the run early (its state is saved)."""

    metrics: dict[str, float]
    """The last evaluation, empty if there was none."""


def train(config: TrainConfig) -> TrainResult:
    """Train to the end of `config`, resuming from its run directory when there is a checkpoint.

    Every rank calls this; the launcher (deepspeed, torchrun or none) only sets the environment.

    Raises:
        ValueError: the configuration does not fit the number of ranks, the model or the data.
        FloatingPointError: training diverged.
    """
    runtime = initialise(config.run.device)
    try:
        with _StopRequest() as stop:
            return _train(config, runtime, stop)
    finally:
        shutdown()


def _train(config: TrainConfig, runtime: Runtime, stop: _StopRequest) -> TrainResult:
    """A run, begun anew from its newest checkpoint where it diverges."""
    run = Run(config, runtime)
    for rollbacks_left in range(config.run.max_rollbacks, -1, -1):
        try:
            return _loop(run, stop)
        except FloatingPointError as error:
            reached = run.loader.state_dict()
            run.log.end({})
            run.close()
            # Every rank has counted the same steps, and sees the same files.
            if not rollbacks_left or not config.run.resume or not run.has_checkpoint():
                raise
            logger.warning("%s; going back to the newest checkpoint", error)
            run = Run(config, runtime)
            # What made it diverge may be in the data since the checkpoint: they are not seen again.
            run.loader.load_state_dict(reached)
    raise AssertionError("the last try returns or raises")


def _loop(run: Run, stop: _StopRequest) -> TrainResult:
    """Steps until the end, or until a signal asks to stop."""
    settings = run.config.run
    metrics: dict[str, float] = {}
    run.log.start(run.describe())
    run.begin()
    while run.step < run.total_steps:
        result, learning_rate = run.one_step()
        last = run.step == run.total_steps
        on_log_step = last or run.step % settings.log_every_steps == 0
        if on_log_step:
            _log_step(run, result, learning_rate)
            if any_rank(stop.requested) and not last:  # what is left then is soon done
                _save(run)
                return _end(run, finished=False, metrics=metrics)
        if last or _due(run.step, settings.evaluate_every_steps):
            metrics = _evaluate(run)
        due = _due(run.step, settings.checkpoint_every_steps) or _time_due(run, on_log_step)
        # Amid bad steps nothing is saved: one could not go back to before them.
        if last or (due and run.engine.guard.skipped_in_a_row() == 0):
            _save(run)
    return _end(run, finished=True, metrics=metrics)


def _log_step(run: Run, result: StepResult, learning_rate: float) -> None:
    run.engine.raise_if_diverged()
    values: dict[str, Any] = {
        "epoch": run.loader.epoch,
        "loss": result.loss,
        "logit_scale": result.logit_scale,
        "gradient_norm": result.info.gradient_norm,
        "learning_rate": learning_rate,
        "loss_scale": run.engine.loss_scale.value,
        "update_applied": result.info.applied,
        "skipped_steps": run.engine.guard.skipped_steps,
        **run.throughput.window(run.loader.wait_seconds),
    }
    run.log.step(run.step, values)


def _evaluate(run: Run) -> dict[str, float]:
    if not run.config.eval.zero_shot and not run.config.eval.retrieval:
        return {}
    with run.throughput.paused():
        evaluator = Evaluator(
            model=run.engine.module,
            tokenizer=run.tokenizer,
            runtime=run.runtime,
            batch_size=run.config.eval.batch_size,
            workers=run.config.eval.workers,
            apply_orientation=run.config.data.apply_orientation,
        )
        metrics = run_suite(evaluator, run.config.eval)
    run.log.evaluation(run.step, metrics)
    if run.runtime.is_main:
        logger.info("evaluation at step %d\n%s", run.step, format_table(metrics))
    return metrics


def _save(run: Run) -> None:
    with run.throughput.paused():
        save_checkpoint(
            run.checkpoints,
            run.engine,
            run.runtime,
            step=run.step,
            loader_state=run.loader.state_dict(),
            model_config=to_dict(run.config.model),
            keep=run.config.run.keep_checkpoints,
            algorithm=run.config.optim.algorithm,
            frozen=run.frozen,
        )
    run.saved_at = time.monotonic()


def _time_due(run: Run, on_log_step: bool) -> bool:
    minutes = run.config.run.checkpoint_every_minutes
    if minutes is None or not on_log_step:
        return False
    # Clocks differ between ranks; one that is due makes all save.
    return any_rank(time.monotonic() - run.saved_at >= minutes * 60)


def _end(run: Run, finished: bool, metrics: dict[str, float]) -> TrainResult:
    report = run.loader.report()
    run.log.end(report)
    run.close()
    if run.runtime.is_main and not finished:
        logger.warning(
            "stopped by a signal at step %d of %d; the same command continues from here",
            run.step,
            run.total_steps,
        )
    return TrainResult(run.step, finished, metrics)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _StopRequest:
    """SIGTERM and SIGINT ask the run to save and stop; a second one ends it at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning(
            "%s: saving at the next log step; send it again to stop at once",
            signal.Signals(number).name,
        )
