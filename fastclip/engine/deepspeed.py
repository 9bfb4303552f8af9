"""DeepSpeed behind the engines' face: ZeRO 0–3. The sole importer of deepspeed.

It runs in its fp32 mode at every stage. Its own autocast mode keeps one gradient scaler per rank,
so that fp16 ranks can disagree on whether a step was skipped; the loss scale is therefore ours, the
same on all ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclip.distributed.runtime import Runtime
from fastclip.engine import whole_state
from fastclip.engine.base import Engine, on_the_host
from fastclip.engine.config import EngineConfig, deepspeed_settings
from fastclip.engine.step_guard import StepInfo
from fastclip.models.clip import Clip, ClipOutput
from fastclip.optim import DeepSpeedOptimizer
from fastclip.tokenizer.packing import PackedTokens

logger = logging.getLogger("fastclip")


class DeepSpeedEngine(Engine):
    """A model and its optimiser under DeepSpeed, on any number of ranks."""

    name: ClassVar[str] = "deepspeed"

    def __init__(
        self,
        model: Clip,
        optimizer: torch.optim.Optimizer | DeepSpeedOptimizer,
        config: EngineConfig,
        runtime: Runtime,
        *,
        micro_batch_size: int,
        micro_batches: int = 1,
        universal: bool = False,
    ) -> None:
        deepspeed = import_deepspeed(runtime)
        super().__init__(model, config, runtime, micro_batches, config.zero_stage)
        settings = deepspeed_settings(
            config,
            micro_batch_size=micro_batch_size,
            micro_batches=micro_batches,
            world_size=runtime.world_size,
            zero_keys=known_zero_keys(),
            load_universal=universal and config.zero_stage > 0,
        )
        self._open = contextlib.ExitStack()
        # DeepSpeed reads a launcher's variable all its life, also where there is no launcher.
        self._open.enter_context(_environment("LOCAL_RANK", str(runtime.local_rank)))
        # ZeRO-3 puts its own function in place of torch's, for the whole process.
        self._open.callback(setattr, F, "linear", F.linear)
        chosen: dict[str, Any] = {"optimizer": optimizer}
        if isinstance(optimizer, DeepSpeedOptimizer):
            if optimizer.kind == "Muon":
                chosen = {"optimizer": _muon(optimizer.groups)}
                if config.zero_stage == 3:  # it needs whole gradients
                    settings["zero_optimization"]["reduce_scatter"] = False
            else:
                chosen = {"model_parameters": optimizer.groups}
                settings["optimizer"] = {"type": optimizer.kind, "params": optimizer.arguments}
        with _refusals_explained():
            self._engine, _, _, _ = deepspeed.initialize(
                model=model, config=settings, dist_init_required=False, **chosen
            )
        if config.zero_stage == 0 and runtime.world_size == 1:
            # Or it would copy all gradients into one buffer, and back, to reduce them over no one.
            self._engine.enable_backward_allreduce = False

    @property
    def module(self) -> Clip:
        return self._engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._engine.basic_optimizer

    def forward(self, images: Tensor | None, tokens: Tensor | PackedTokens | None) -> ClipOutput:
        return self._engine(images=images, tokens=tokens)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if self.loss_scale.enabled:
            if self.zero_stage == 0:
                loss = loss * self.loss_scale.value
            else:
                self._engine.optimizer.override_loss_scale(float(self.loss_scale.value))
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # DeepSpeed counts micro-steps; nothing is updated before the last

    def _update(self) -> StepInfo:
        if self.zero_stage == 0:
            # DeepSpeed steps a plain optimiser; unscaling, clipping and the check are ours.
            info = self._prepare_unsharded_update()
            self._engine.step()
            return info
        self._engine.step()
        overflow = bool(self._engine.optimizer.overflow)
        norm = math.inf if overflow else float(self._engine.get_global_grad_norm())
        return StepInfo(torch.tensor(norm), torch.tensor(not overflow))

    def save(self, directory: Path, tag: str) -> None:
        if self.zero_stage:
            self._engine.save_checkpoint(str(directory), tag=tag, save_latest=False)
        elif self.runtime.is_main:
            whole_state.save(directory / tag, self.module, self.optimizer)

    def load(self, directory: Path, tag: str) -> None:
        if self.zero_stage == 0:
            whole_state.load(directory / tag, self.module, self.optimizer)
            return
        if self.zero_stage < 3:
            sharded = self._engine.optimizer
            sharded.load_hp_checkpoint_state_from_checkpoint_dir = functools.partial(
                _load_partitions, sharded
            )
        own = ("params", "step")  # a count, where apex or DeepSpeed keeps it in the group
        settings = [
            {k: v for k, v in group.items() if k not in own}
            for group in self.optimizer.param_groups
        ]
        with weights_only_loading():
            path, _ = self._engine.load_checkpoint(str(directory), tag=tag)
        if path is None:
            raise FileNotFoundError(
                f"{directory / tag} is no complete DeepSpeed checkpoint for ZeRO stage "
                f"{self.zero_stage}"
            )
        # The groups may be others now. The configuration says what their settings are, and under
        # ZeRO-3 DeepSpeed 0.19.8 lets all parameters of a universal checkpoint share one tensor as
        # their count of steps.
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        # Counts come on the host, and the fused AdamW wants them where the parameters are.
        for parameter, state in self.optimizer.state.items():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].to(parameter.device, copy=True)

    def full_state_dict(self) -> dict[str, Tensor] | None:
        import deepspeed

        full: dict[str, Tensor] = {}
        parameters = dict(self.module.named_parameters())
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            # One parameter at a time, so that ZeRO-3 never holds the whole model on one device.
            gathered = (
                deepspeed.zero.GatheredParameters([parameters[name]])
                if self.zero_stage == 3 and name in parameters
                else contextlib.nullcontext()
            )
            with gathered:
                if self.runtime.is_main:
                    full[name] = on_the_host(tensor)
        return full if self.runtime.is_main else None

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()
        self._open.close()


def _load_partitions(sharded: Any, groups_name: str, directory: str) -> None:
    """Read a universal checkpoint into the partitions of ZeRO 1 or 2.

    In place of DeepSpeed 0.19.8's own function, which fails on ranks that own nothing of a group,
    as all but the first do of the temperature's.
    """
    from deepspeed.utils.tensor_fragment import map_to_flat_opt_states

    folder = Path(directory) / "zero"
    counts = torch.load(folder / "optimizer_state.pt", weights_only=True)
    sharded._load_global_state(counts)
    step = counts["optimizer_state_dict"]["state"][0]["step"]
    groups = sharded.optimizer.param_groups
    states = sharded.optimizer.state
    for group, parameters in zip(groups, getattr(sharded, groups_name), strict=True):
        for parameter in parameters:
            if parameter._hp_mapping is not None:  # this rank owns some of it
                place = str(folder / sharded.param_names[parameter])
                parameter.load_hp_checkpoint_state(place, 0, 1)
        (flat,) = group["params"]
        states[flat]["step"] = step.clone()
        map_to_flat_opt_states(flat, parameters, states, ("exp_avg", "exp_avg_sq"))


def _muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """DeepSpeed's Muon. (Made from its settings, it would choose the parameters itself.)"""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return MuonWithAuxAdam(groups)


@contextlib.contextmanager
def _refusals_explained() -> Iterator[None]:
    """DeepSpeed says by assertions which settings do not go together."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        yield
    except (AssertionError, ZeRORuntimeException) as error:
        raise ValueError(f"DeepSpeed refuses the engine's settings: {error}") from error


def import_deepspeed(runtime: Runtime) -> Any:
    """Import DeepSpeed for this device and bind it to the process group that already exists."""
    if runtime.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _deepspeed("training on several ranks, or with engine.backend=deepspeed,")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that newer torch has renamed, once per step.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed.c10d_logger"
    )
    if runtime.device.type == "cpu":
        # On a CPU DeepSpeed would compile a shared-memory all-reduce at the first launch (over a
        # minute, needs a compiler); gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _forget_earlier_group(deepspeed)
    deepspeed.init_distributed(dist_backend=runtime.backend, verbose=False)
    return deepspeed


def _deepspeed(who: str) -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            f"{who} needs DeepSpeed: pip install 'fastclip-torch[train]' ({error})"
        ) from error
    return deepspeed


_bound_to: dist.ProcessGroup | None = None


def _forget_earlier_group(deepspeed: Any) -> None:
    """Let DeepSpeed work again in a process whose first run has left its process group."""
    global _bound_to
    world = dist.group.WORLD
    if _bound_to is not None and _bound_to is not world:
        from deepspeed.utils import groups

        groups._release_process_group_references(group=None)
        deepspeed.comm.comm.cdb = None
    _bound_to = world


def known_zero_keys() -> set[str]:
    """What the installed DeepSpeed accepts inside ``zero_optimization``."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    return {*fields, *(field.alias for field in fields.values() if field.alias is not None)}


@contextlib.contextmanager
def weights_only_loading() -> Iterator[None]:
    """Make DeepSpeed's `torch.load` calls refuse everything but tensors and plain data.

    DeepSpeed passes ``weights_only=False``; torch honours this environment variable above it. The
    few classes that DeepSpeed's own files contain are allowed by name.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, ZeroStageEnum, fragment_address]
    with (
        _environment("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"),
        torch.serialization.safe_globals(allowed),
    ):
        yield


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def merge_shards(source: Path, output: Path, *, zero_stage: int) -> Tensor:
    """Make the universal form of a sharded checkpoint; returns the number of updates it had.

    One process; a few seconds.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: the optimiser's state is not Adam's, which is all that DeepSpeed converts.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _deepspeed(f"{source}, written by several ranks or at ZeRO {zero_stage},")
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(output),
        num_extract_workers=1,  # one worker runs in this process: no fork beside gloo's threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=zero_stage in (1, 2),
    )
    silence = io.StringIO()
    with (
        weights_only_loading(),
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):
        try:
            ds_to_universal.main(arguments)
        except KeyError as error:
            raise ValueError(
                f"{source} holds an optimiser state without {error}: it can only be resumed with "
                "the engine.zero_stage and the number of ranks that wrote it"
            ) from error
        steps = sorted((output / "zero").glob("*/step.pt"))
        if steps:
            return torch.as_tensor(torch.load(steps[0], weights_only=True))
        merged = torch.load(output / "zero" / "optimizer_state.pt", weights_only=True)
        states = merged["optimizer_state_dict"]["state"]
        return torch.as_tensor(states[0]["step"])
