"""The training loop: next batch, one step, and when to log, save, evaluate and stop."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fastclip.checkpoint import save_checkpoint
from fastclip.checkpoint_folder import complete_checkpoints, put_back, set_aside
from fastclip.config import TrainConfig, to_dict
from fastclip.distributed.collectives import all_gather_integers, any_rank
from fastclip.distributed.runtime import Runtime, initialise, shutdown
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.suite import format_table, run_suite
from fastclip.run import Run
from fastclip.run_folder import alone_in
from fastclip.train_step import StepResult

logger = logging.getLogger("fastclip")

_SECONDS_BETWEEN_CHECKS = 5.0
"""About as long does it take until all ranks know that one was asked to stop."""

_SECONDS_OF_ONE_SIGNAL = 2.0
"""A launcher passes on what the terminal has sent already: that is no second wish."""


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
        ValueError: the configuration does not fit the number of ranks, the model or the data, or
            another process trains in its run directory.
        FloatingPointError: training diverged.
    """
    runtime = initialise(config.run.device)
    try:
        with _StopRequest() as stop, alone_in(config.run.directory, runtime):
            return _train(config, runtime, stop)
    finally:
        shutdown()


def _train(config: TrainConfig, runtime: Runtime, stop: _StopRequest) -> TrainResult:
    """A run, begun anew from its newest checkpoint where it diverges.

    A checkpoint from which nothing is learnt is passed over for the one before it; if nothing is
    learnt from that either, they are not the reason, and are all left.
    """
    aside: list[Path] = []
    run = Run(config, runtime)
    for rollbacks_left in range(config.run.max_rollbacks, -1, -1):
        try:
            return _loop(run, stop)
        except FloatingPointError as error:
            reached = run.loader.state_dict()
            run.log.end({})
            run.close()
            # Every rank has counted the same steps, and sees the same files.
            useless = run.resumed_from if run.nothing_learnt() else None
            last_try = not rollbacks_left or not config.run.resume or not run.has_checkpoint()
            if last_try or (useless and len(complete_checkpoints(run.checkpoints)) == 1):
                if useless:
                    put_back(aside, runtime)
                raise
            if useless:
                logger.warning("%s: not one good update has followed it", useless)
                aside.append(set_aside(run.checkpoints, useless, runtime))
            else:
                aside.clear()
            logger.warning("%s; going back to the newest checkpoint", error)
            run = Run(config, runtime)
            # What made it diverge may be in the data since the checkpoint: they are not seen again.
            run.loader.load_state_dict(reached)
    raise AssertionError("the last try returns or raises")


def _loop(run: Run, stop: _StopRequest) -> TrainResult:
    """Steps until the end, or until a signal asks to stop."""
    settings = run.config.run
    metrics: dict[str, float] = {}
    checks = _Checks(run, stop)
    due = stopping = False
    run.log.start(run.describe())
    if run.step and _evaluation_due(run) and not any_rank(run.log.has_evaluation(run.step)):
        metrics = _evaluate(run)  # the launch before has ended between checkpoint and evaluation
    if run.step >= run.total_steps:
        logger.info("nothing is left to train: step %d of %d", run.step, run.total_steps)
    run.begin()
    while run.step < run.total_steps:
        result, learning_rate = run.one_step()
        last = run.step == run.total_steps
        on_log_step = last or run.step % settings.log_every_steps == 0
        if on_log_step:
            _log_step(run, result, learning_rate)
        asked_to_stop, time_to_save = checks(on_log_step)
        stopping = stopping or asked_to_stop
        due = due or time_to_save or _due(run.step, settings.checkpoint_every_steps)
        # Amid bad steps nothing is saved, but after them: one could not go back to before them.
        if last or ((due or stopping) and run.engine.guard.skipped_in_a_row() == 0):
            _save(run)
            due = False
            if stopping and not last:  # what is left then is soon done
                return _stopped(run, metrics)
        elif stopping:
            run.engine.raise_if_diverged()
        if _evaluation_due(run):
            metrics = _evaluate(run)
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


def _evaluation_due(run: Run) -> bool:
    evaluation, every = run.config.eval, run.config.run.evaluate_every_steps
    if not evaluation.zero_shot and not evaluation.retrieval:
        return False
    return run.step == run.total_steps or _due(run.step, every)


def _evaluate(run: Run) -> dict[str, float]:
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
    keep: int | None = run.config.run.keep_checkpoints
    in_a_row = run.engine.guard.skipped_in_a_row()
    if in_a_row:
        keep = None
        logger.warning(
            "the last %d update(s) of the run were skipped: look at metrics.jsonl whether it has "
            "diverged; the checkpoints before the last one are all kept",
            in_a_row,
        )
    with run.throughput.paused():
        save_checkpoint(
            run.checkpoints,
            run.engine,
            run.runtime,
            step=run.step,
            pairs=run.pairs,
            loader_state=run.loader.state_dict(),
            model_config=to_dict(run.config.model),
            keep=keep,
            algorithm=run.config.optim.algorithm,
            frozen=run.frozen,
        )
    run.saved_at = time.monotonic()


def _stopped(run: Run, metrics: dict[str, float]) -> TrainResult:
    if run.runtime.is_main:
        logger.warning(
            "stopped by a signal at step %d of %d; the same command continues from here",
            run.step,
            run.total_steps,
        )
    return _end(run, finished=False, metrics=metrics)


def _end(run: Run, finished: bool, metrics: dict[str, float]) -> TrainResult:
    report = run.loader.report()
    run.log.end(report)
    run.close()
    return TrainResult(run.step, finished, metrics)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Checks:
    """What the ranks have to agree on: on log steps, and where these are rare every few seconds.

    In steps, since clocks differ; how many these are, rank 0 says.
    """

    def __init__(self, run: Run, stop: _StopRequest) -> None:
        self._run, self._stop = run, stop
        self._step, self._begin, self._every = run.step, time.monotonic(), 1

    def __call__(self, on_log_step: bool) -> tuple[bool, bool]:
        """Whether one rank was asked to stop; whether, on a log step, it is time to save."""
        run, now = self._run, time.monotonic()
        steps = run.step - self._step
        if not on_log_step and steps < self._every:
            return False, False
        minutes = run.config.run.checkpoint_every_minutes
        own = [
            int(self._stop.requested),
            int(on_log_step and minutes is not None and now - run.saved_at >= minutes * 60),
            max(1, int(_SECONDS_BETWEEN_CHECKS * steps / max(now - self._begin, 1e-3))),
        ]
        stops, saves, everys = zip(*all_gather_integers(own, run.runtime.device), strict=True)
        self._step, self._begin, self._every = run.step, now, everys[0]
        return any(stops), any(saves)


class _StopRequest:
    """SIGTERM and SIGINT ask the run to save and stop; a second one ends it at once."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
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
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
            logger.warning(
                "%s: saving after the next steps; send it again to stop at once",
                signal.Signals(number).name,
            )
        elif now - self._since > _SECONDS_OF_ONE_SIGNAL:
            raise KeyboardInterrupt
