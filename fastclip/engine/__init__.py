"""What runs a step: plain PyTorch on one rank, DeepSpeed on several, behind one face."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastclip.distributed.runtime import Runtime
from fastclip.engine import universal as universal_form
from fastclip.engine import whole_state
from fastclip.engine.base import Engine
from fastclip.engine.config import EngineConfig, choose_backend, deepspeed_settings
from fastclip.engine.plain import PlainEngine
from fastclip.models.clip import Clip
from fastclip.optim import (
    OptimConfig,
    apex_optimizer,
    build_optimizer,
    parameter_groups,
    store_compactly,
)

__all__ = [
    "Engine",
    "EngineConfig",
    "PlainEngine",
    "build_engine",
    "check_engine",
    "convert_to_universal",
]


def check_engine(config: EngineConfig, optim: OptimConfig, runtime: Runtime) -> None:
    """Find out now what would stop `build_engine` when the data have been looked through.

    Raises:
        FileNotFoundError, ValueError: the settings do not fit each other or the number of ranks.
        ImportError: DeepSpeed or apex is needed and not there.
    """
    if optim.implementation == "apex":
        apex_optimizer(optim)
    if choose_backend(config, runtime.world_size, optim) == "deepspeed":
        from fastclip.engine.deepspeed import import_deepspeed, known_zero_keys

        import_deepspeed(runtime)
        deepspeed_settings(
            config,
            micro_batch_size=1,
            micro_batches=1,
            world_size=runtime.world_size,
            zero_keys=known_zero_keys(),
        )


def build_engine(
    model: Clip,
    optim: OptimConfig | torch.optim.Optimizer,
    config: EngineConfig,
    runtime: Runtime,
    *,
    micro_batch_size: int,
    micro_batches: int = 1,
    universal: bool = False,
) -> Engine:
    """The engine that `config` asks for, and the optimiser inside.

    Args:
        model: on its device, with the weights to begin with.
        optim: settings of the optimiser; or one that has been made, of fp32 weights.
        micro_batch_size: pairs of one rank's micro-batch.
        micro_batches: of a step.
        universal: a checkpoint of DeepSpeed's universal form will be loaded.

    Raises:
        ValueError: the settings do not fit each other or the number of ranks.
    """
    settings = optim if isinstance(optim, OptimConfig) else OptimConfig()
    backend = choose_backend(config, runtime.world_size, settings)
    if settings.algorithm == "compact_adamw":
        store_compactly(model)
    optimizer = optim
    if isinstance(optimizer, OptimConfig):
        optimizer = build_optimizer(parameter_groups(model, settings), settings, runtime.device)
    if backend == "plain":
        assert isinstance(optimizer, torch.optim.Optimizer)
        return PlainEngine(model, optimizer, config, runtime, micro_batches=micro_batches)
    from fastclip.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        optimizer,
        config,
        runtime,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        universal=universal,
    )


def convert_to_universal(source: Path, output: Path, *, zero_stage: int) -> None:
    """Rewrite a checkpoint so that any engine, stage and world size can load it. One process.

    `output` appears when it is complete.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: its optimiser's state is of a kind that cannot be converted.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no checkpoint {source}")
    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    if zero_stage == 0:
        states = whole_state.read(source / whole_state.FILE_NAME)
        if not states:
            raise ValueError(f"{source} was written before the optimiser's first update")
        universal_form.write(partial, load_file(source / "model.safetensors"), states)
        step = next(iter(states.values()))["step"]
    else:
        from fastclip.engine.deepspeed import merge_shards

        step = merge_shards(source, partial, zero_stage=zero_stage)
    universal_form.complete(partial, step)
    os.replace(partial, output)
