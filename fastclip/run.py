"""A run: all parts, wired together, and one step of it. This is the one place where they meet."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path

import torch
from torch.profiler import record_function

from fastclip.checkpoint import (
    ResumePoint,
    find_resume_point,
    load_checkpoint,
    load_weights,
)
from fastclip.config import TrainConfig, save_config, to_dict
from fastclip.data.batch import Batch
from fastclip.data.config import DataConfig
from fastclip.data.loader import TrainLoader
from fastclip.data.shards import expand_shards
from fastclip.distributed.collectives import all_gather_integers, barrier
from fastclip.distributed.runtime import Runtime
from fastclip.engine import build_engine, check_engine
from fastclip.engine.config import AUTOCAST_DTYPES, effective_zero_stage
from fastclip.eval.suite import check_tasks
from fastclip.flops import executed_flops_per_sample
from fastclip.metrics import RunLogger, Throughput
from fastclip.micro_batch_size import find_micro_batches
from fastclip.models.attention import choose
from fastclip.models.clip import Clip
from fastclip.models.interop import init_from
from fastclip.models.layers import convert_sync_batch_norm
from fastclip.optim import learning_rate_at, set_learning_rate
from fastclip.tokenizer import Tokenizer
from fastclip.train_step import StepResult, TrainStep, check_micro_batching

logger = logging.getLogger("fastclip")

_GRAPHS_MULTIPLE = 1024
"""Of packed captions' tokens: some two per cent of a thousand captions'."""


class Run:
    """A run's parts, wired together in the order in which they depend on each other."""

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        run = config.run
        self.config = config
        self.runtime = runtime
        self.directory = Path(run.directory)
        self.checkpoints = self.directory / "checkpoints"
        batch_size = check_settings(config, runtime)

        torch.manual_seed(run.seed)  # the same initial weights on every rank
        self._zero_stage = effective_zero_stage(config.engine, runtime.world_size, config.optim)
        model = build_model(config, self._zero_stage)
        if run.micro_batches != "auto":
            check_micro_batching(model, run.micro_batches)
        point = None
        if run.resume:
            point = self._resume_point()
        if point is not None:
            load_weights(point, model)
        elif run.init_from is not None:
            init_from(model, Path(run.init_from))
        model = model.to(runtime.device)
        if runtime.world_size > 1:
            convert_sync_batch_norm(model)
        micro_batches = self._micro_batches(model, batch_size)
        try:
            self.tokenizer = Tokenizer(
                context_length=config.model.text.context_length, backend=config.data.tokenizer
            )
        except ImportError as error:
            raise ImportError(f"{error}; or train with data.tokenizer=python") from error
        self.loader = TrainLoader(
            _loader_config(config, runtime),
            image_size=config.model.vision.image_size,
            tokenizer=self.tokenizer,
            batch_size=batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
            seed=run.seed,
            micro_batches=micro_batches,
            device=runtime.device,
            quarantine=self.directory / f"quarantine-{runtime.rank:05d}.jsonl",
        )
        check_agreement(self.loader.identity, self.loader.samples_per_epoch, runtime)
        self.step = self.pairs = 0
        self.resumed_from: str | None = None
        if point is not None:
            self.step, self.pairs, self.resumed_from = point.step, point.pairs, point.tag
        self.total_steps = self._total_steps()
        # Refuses a run that is shorter than its warm-up.
        learning_rate_at(0, config.optim, self.total_steps)
        self.engine = build_engine(
            model,
            config.optim,
            config.engine,
            runtime,
            micro_batch_size=batch_size // micro_batches,
            micro_batches=micro_batches,
            universal=point is not None and point.universal,
        )
        torch.manual_seed(run.seed + 1 + runtime.rank)  # ranks drop different patches
        self.train_step = TrainStep(
            self.engine, config.loss, micro_batches=micro_batches, ranks_alike=True
        )
        if point is not None:
            self._resume(point)
        self._begun_at = self.step
        if runtime.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_config(config, self.directory / "config.json")
        barrier()
        self.log = RunLogger(
            self.directory,
            is_main=runtime.is_main,
            tensorboard=run.tensorboard,
            wandb_project=run.wandb_project,
            total_steps=self.total_steps,
            resume_at=self.step,
        )
        self.throughput = Throughput(
            device=runtime.device,
            precision=config.engine.precision,
            global_batch_size=run.global_batch_size,
            world_size=runtime.world_size,
        )
        self.saved_at = time.monotonic()

    def _micro_batches(self, model: Clip, batch_size: int) -> int:
        """As set, or as many as the rank with the least memory needs."""
        asked = self.config.run.micro_batches
        if asked != "auto":
            return asked
        model.train().autocast_dtype = AUTOCAST_DTYPES[self.config.engine.precision]
        own = find_micro_batches(
            model,
            batch_size,
            loss_budget=self.config.loss.memory_budget,
            optimizer_bytes=self.config.optim.bytes_per_parameter,
        )
        return max(parts for (parts,) in all_gather_integers([own], self.runtime.device))

    def _resume(self, point: ResumePoint) -> None:
        load_checkpoint(point, self.engine, self.runtime)
        self.loader.load_state_dict(point.loader_state)
        if self.runtime.is_main:
            logger.info("resuming from %s at step %d", point.directory / point.tag, point.step)

    def begin(self) -> None:
        """To be called before the first step."""
        self.engine.module.train()
        self.throughput.start(self.loader.wait_seconds)

    def one_step(self) -> tuple[StepResult, float]:
        """Train on the next batch; what the step reports, and its learning rate."""
        with record_function("fastclip::data wait"):
            batch = next(self.loader)
        with record_function("fastclip::copy to device"):
            batch = batch.to(self.runtime.device, non_blocking=True)
        learning_rate = set_learning_rate(
            self.engine.optimizer, self.step, self.config.optim, self.total_steps
        )
        result = self.train_step(batch)
        self.step += 1
        self.pairs += self.config.run.global_batch_size
        self.throughput.step(self._flops_per_sample(batch))
        return result, learning_rate

    def nothing_learnt(self) -> bool:
        """Whether every update since this run was begun or resumed was skipped."""
        return int(self.engine.guard.skipped_steps) >= self.step - self._begun_at

    def _total_steps(self) -> int:
        """Steps of the run: as set, or enough for the epochs asked for.

        Pairs that were trained on in batches of another size count as pairs.
        """
        run = self.config.run
        if run.steps is not None:
            return run.steps
        wanted = run.epochs * self.loader.samples_per_epoch
        if self.pairs == self.step * run.global_batch_size:
            return max(1, round(wanted / run.global_batch_size))
        left = (wanted - self.pairs) / run.global_batch_size
        # Halves go up: rounded to even, the sum would depend on where one has stopped.
        return self.step + max(0, math.floor(left + 0.5))

    def has_checkpoint(self) -> bool:
        """Whether there is something to go back to."""
        return self._resume_point() is not None

    def _resume_point(self) -> ResumePoint | None:
        return find_resume_point(
            self.checkpoints,
            self.runtime,
            self._zero_stage,
            to_dict(self.config.model),
            algorithm=self.config.optim.algorithm,
            frozen=self.frozen,
        )

    @property
    def frozen(self) -> list[str]:
        """Towers that are not trained."""
        run = self.config.run
        choices = (("visual", run.freeze_visual), ("text", run.freeze_text))
        return [name for name, frozen in choices if frozen]

    def close(self) -> None:
        """Stop the loader's threads, release the engine."""
        self.loader.close()
        self.engine.close()

    def _flops_per_sample(self, batch: Batch) -> float:
        return executed_flops_per_sample(
            self.config.model,
            batch.computed_lengths(),
            last_row=self.config.attention.last_row,
            patch_dropout=self.config.run.patch_dropout,
        )

    def describe(self) -> str:
        """One line for the log."""
        config, runtime = self.config, self.runtime
        # ZeRO-3 leaves empty parameters here and remembers how many numbers they stand for.
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        return (
            f"{parameters / 1e6:.1f} M parameters, {self.loader.samples_per_epoch:,} pairs, "
            f"{self.total_steps:,} steps of {config.run.global_batch_size:,} pairs on "
            f"{runtime.world_size} rank(s) of {runtime.device.type}, {config.engine.precision}, "
            f"{self._engine()}, {config.data.text} texts, attention by {self._attention()}"
        )

    def _engine(self) -> str:
        sharded = self.engine.name == "deepspeed"
        return f"ZeRO {self.engine.zero_stage}" if sharded else f"{self.engine.name} engine"

    def _attention(self) -> str:
        model = self.engine.module
        dtype = model.autocast_dtype or torch.float32
        like = torch.empty(0, dtype=dtype, device=self.runtime.device)
        packed = self.config.data.text == "packed"
        impls = {choose(self.config.attention.impl, like, packed=p) for p in (False, packed)}
        return " and ".join(sorted(impls))


def build_model(config: TrainConfig, zero_stage: int) -> Clip:
    """The towers with the run's switches applied: frozen towers, activation checkpointing.

    Raises:
        ValueError: a switch does not fit the towers or the stage.
    """
    model = Clip(config.model)
    run = config.run
    policies = (run.activation_checkpointing_visual, run.activation_checkpointing_text)
    if zero_stage == 3 and "selective" in policies:
        raise ValueError(
            "run.activation_checkpointing_*=selective needs engine.zero_stage 0, 1 or 2: under 3 "
            "the recomputation would release gathered parameters too early; use full"
        )
    if zero_stage == 3 and run.compile == "towers":
        raise ValueError(
            "run.compile=towers needs engine.zero_stage 0, 1 or 2: under 3 parameters are gathered "
            "between the blocks; use blocks"
        )
    model.set_activation_checkpointing(
        vision=run.activation_checkpointing_visual, text=run.activation_checkpointing_text
    )
    model.set_attention(config.attention)
    if run.layer_norm == "apex":
        model.use_apex_layer_norm()
    model.set_patch_dropout(run.patch_dropout)
    model.compile_parts(run.compile, cuda_graphs=run.cuda_graphs)
    model.freeze(vision=run.freeze_visual, text=run.freeze_text)
    return model


def check_settings(config: TrainConfig, runtime: Runtime) -> int:
    """Find what contradicts what before models are made and shards are read; pairs of a rank.

    Raises:
        FileNotFoundError, ImportError, ValueError: the settings do not fit each other, the number
            of ranks, the device, or what is installed.
    """
    batch_size = per_rank_batch_size(config, runtime.world_size)
    if "://" not in config.data.train:  # which would be asked for twice
        expand_shards(config.data.train)
    config.loss.check(config.model)
    check_tasks(config.eval)
    if config.run.steps is not None:
        learning_rate_at(0, config.optim, config.run.steps)
    if config.run.cuda_graphs and (config.run.compile == "none" or runtime.device.type != "cuda"):
        raise ValueError(
            "run.cuda_graphs needs run.compile=blocks or towers and a CUDA device, not "
            f"run.compile={config.run.compile} on {runtime.device.type}"
        )
    if config.run.cuda_graphs:
        _check_graphs(config, runtime.world_size)
    check_engine(config.engine, config.optim, runtime)
    return batch_size


def _check_graphs(config: TrainConfig, world_size: int) -> None:
    """Refuse what would overwrite a graph's memory while it is in use, or record it at each step.

    Raises:
        ValueError: naming the setting.
    """
    run = config.run
    checkpointing = (run.activation_checkpointing_visual, run.activation_checkpointing_text)
    if run.micro_batches != 1:
        raise ValueError(
            f"run.cuda_graphs needs run.micro_batches=1, not {run.micro_batches}: the features of "
            "one micro-batch would be overwritten by the next"
        )
    if "full" in checkpointing:
        raise ValueError(
            "run.cuda_graphs does not go with run.activation_checkpointing_visual or _text=full: "
            "choose selective"
        )
    if effective_zero_stage(config.engine, world_size, config.optim) == 3:
        raise ValueError(
            "run.cuda_graphs needs parameters that stay where they are: engine.zero_stage below 3"
        )


def check_agreement(identity: str, samples: int, runtime: Runtime) -> None:
    """Refuse ranks that see different data: samples would be repeated, and others never seen.

    Raises:
        ValueError: their shards differ.
    """
    halves = [int(identity[:8], 16), int(identity[8:], 16)]
    seen = all_gather_integers([*halves, samples], runtime.device)
    for rank, (*other, count) in enumerate(seen):
        if other != halves:
            raise ValueError(
                f"rank {rank} finds other data than rank {runtime.rank} ({count:,} and {samples:,} "
                "usable pairs): the shards of all machines have to be the same files"
            )


def _loader_config(config: TrainConfig, runtime: Runtime) -> DataConfig:
    """The loader's settings: its share of the machine, and few shapes of texts for graphs."""
    data = dataclasses.replace(config.data, workers=config.data.threads(runtime.local_world_size))
    if not config.run.cuda_graphs or data.text != "packed" or data.pack_to_multiple > 1:
        return data
    return dataclasses.replace(data, pack_to_multiple=_GRAPHS_MULTIPLE)


def per_rank_batch_size(config: TrainConfig, world_size: int) -> int:
    """A rank's share of the global batch.

    Raises:
        ValueError: ranks times micro-batches do not divide it.
    """
    micro_batches = config.run.micro_batches
    if micro_batches == "auto":
        micro_batches = 1
    total, parts = config.run.global_batch_size, world_size * micro_batches
    if total % parts:
        raise ValueError(
            f"run.global_batch_size={total} is not divisible by {world_size} rank(s) × "
            f"{micro_batches} micro-batch(es); nearest: {max(total // parts, 1) * parts}"
        )
    return total // world_size
