"""DeepSpeed behind one small face: ZeRO 0–3, world size 1 included. The sole importer of deepspeed.

Parameters live in fp32 and DeepSpeed runs in its fp32 mode at every stage; reduced precision is
torch autocast inside the model's forward. Two reasons: the temperature must stay fp32 in every
mode, and DeepSpeed's own autocast mode keeps one gradient scaler per rank, so that fp16 ranks can
disagree on whether a step was skipped. The dynamic loss scale for fp16 is therefore kept here, the
same on all ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from fastclip.distributed.runtime import Runtime
from fastclip.engine_config import AUTOCAST_DTYPES, EngineConfig, deepspeed_settings
from fastclip.models.clip import Clip, ClipOutput
from fastclip.step_guard import LossScale, StepGuard, StepInfo
from fastclip.tokenizer.packing import PackedTokens

logger = logging.getLogger("fastclip")


class Engine:
    """A model and its optimiser under DeepSpeed.

    One optimiser step is: for each micro-batch `forward`, then `backward` on its loss; after the
    last one `step`. Gradients of the micro-batches add up (they are not averaged over them), and
    are averaged over ranks, which is what the losses' rank convention expects.
    """

    def __init__(
        self,
        model: Clip,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        runtime: Runtime,
        *,
        micro_batch_size: int,
        micro_batches: int = 1,
        load_universal: bool = False,
    ) -> None:
        deepspeed = import_deepspeed(runtime)
        self.config = config
        self.runtime = runtime
        self.micro_batches = micro_batches
        # DeepSpeed's sharded optimisers ask the host for the scale, and tell it the norm.
        where = runtime.device if config.zero_stage == 0 else torch.device("cpu")
        self.loss_scale = LossScale(
            config.initial_loss_scale, config.loss_scale_window, config.precision == "fp16", where
        )
        self.guard = StepGuard(config, where)
        self._backwards = 0
        settings = deepspeed_settings(
            config,
            micro_batch_size=micro_batch_size,
            micro_batches=micro_batches,
            world_size=runtime.world_size,
            on_cuda=runtime.device.type == "cuda",
            zero_keys=known_zero_keys(),
            load_universal=load_universal,
        )
        model.autocast_dtype = AUTOCAST_DTYPES[config.precision]
        self._open = contextlib.ExitStack()
        # DeepSpeed reads a launcher's variable all its life, also where there is no launcher.
        self._open.enter_context(_environment("LOCAL_RANK", str(runtime.local_rank)))
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        if config.zero_stage == 0 and runtime.world_size == 1:
            # Or it would copy all gradients into one buffer, and back, to reduce them over no one.
            self._engine.enable_backward_allreduce = False

    @property
    def module(self) -> Clip:
        """The model. Under ZeRO-3 its parameters are empty outside its own forward."""
        return self._engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser inside; its `param_groups` carry the learning rates."""
        return self._engine.basic_optimizer

    def forward(self, images: Tensor | None, tokens: Tensor | PackedTokens | None) -> ClipOutput:
        """Run the towers; see `Clip.forward` for shapes."""
        return self._engine(images=images, tokens=tokens)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's `loss` (shape []) to those of the others."""
        self._backwards += 1
        if self._backwards > self.micro_batches:
            raise RuntimeError(
                f"backward call {self._backwards} of a step with {self.micro_batches} micro-batches"
            )
        if self.loss_scale.enabled:
            if self.config.zero_stage == 0:
                loss = loss * self.loss_scale.value
            else:
                self._engine.optimizer.override_loss_scale(float(self.loss_scale.value))
        with record_function("fastclip::backward"):
            self._engine.backward(loss, scale_wrt_gas=False)
        if self._backwards < self.micro_batches:
            self._engine.step()  # DeepSpeed counts micro-steps; nothing is updated before the last

    def step(self) -> StepInfo:
        """Update the parameters; a step whose gradient is not finite is skipped on every rank.

        Without sharding and with torch's fused AdamW nothing here waits for the device.
        """
        if self._backwards != self.micro_batches:
            raise RuntimeError(
                f"step after {self._backwards} of {self.micro_batches} micro-batches: call "
                "backward for each of them first"
            )
        self._backwards = 0
        with record_function("fastclip::update"):
            info = self._step_sharded() if self.config.zero_stage else self._step_unsharded()
        self.loss_scale.update(~info.applied)
        self.guard.count(info.applied)
        return info

    def _step_sharded(self) -> StepInfo:
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return StepInfo(torch.tensor(norm), torch.tensor(not self._engine.optimizer.overflow))

    def _step_unsharded(self) -> StepInfo:
        """ZeRO 0: DeepSpeed steps a plain optimiser; unscaling, clipping and the check are ours."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / self.loss_scale.value
        good = self.guard.judge(norm)
        divisor = self.loss_scale.value if self.loss_scale.enabled else None
        if self.config.gradient_clipping > 0:
            excess = ((norm + 1e-6) / self.config.gradient_clipping).clamp(min=1.0)
            divisor = excess if divisor is None else divisor * excess
        optimizer: Any = self.optimizer
        if type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]:
            # The update's own kernels divide by one, and do nothing where the other is 1.
            vars(optimizer).update(grad_scale=divisor, found_inf=(~good).float())
        elif not bool(good):
            for parameter in parameters:
                parameter.grad = None  # an optimiser step without gradients changes nothing
        elif divisor is not None:
            for gradient in gradients:
                gradient.div_(divisor)
        self._engine.step()
        return StepInfo(torch.where(norm.isfinite(), norm, torch.inf), good)

    def raise_if_diverged(self) -> None:
        """Raise FloatingPointError if too many updates in a row were skipped; waits for them."""
        self.guard.raise_if_diverged()

    def save(self, directory: Path, tag: str, state: dict[str, Any]) -> None:
        """Write DeepSpeed's files into `directory/tag`. Collective; `state` holds plain data."""
        own = {"fastclip": state, "loss_scale": self.loss_scale.state_dict()}
        own["guard"] = self.guard.state_dict()
        self._engine.save_checkpoint(str(directory), tag=tag, client_state=own, save_latest=False)

    def load(self, directory: Path, tag: str) -> dict[str, Any]:
        """Restore what `save` wrote and return its `state`. Collective; the engine must be new."""
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        with weights_only_loading():
            path, own = self._engine.load_checkpoint(str(directory), tag=tag)
        if path is None or own is None:
            raise FileNotFoundError(
                f"{directory / tag} is no complete DeepSpeed checkpoint for ZeRO stage "
                f"{self.config.zero_stage}"
            )
        # The configuration says what each group's settings are. (From a universal checkpoint
        # DeepSpeed 0.19.8 gives every group those of the first under ZeRO-3, decay of biases
        # included, and lets all parameters share one tensor as their count of steps.)
        for group, setting in zip(groups, settings, strict=True):
            group.update(setting)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        self.loss_scale.load_state_dict(own["loss_scale"])
        self.guard.load_state_dict(own["guard"])
        return own["fastclip"]

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The whole model in fp32 on the CPU: on rank 0 a dict, elsewhere None. Collective."""
        import deepspeed

        sharded = self.config.zero_stage == 3
        full: dict[str, Tensor] = {}
        parameters = dict(self.module.named_parameters())
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            # One parameter at a time, so that ZeRO-3 never holds the whole model on one device.
            gathered = (
                deepspeed.zero.GatheredParameters([parameters[name]])
                if sharded and name in parameters
                else contextlib.nullcontext()
            )
            with gathered:
                if self.runtime.is_main:
                    full[name] = tensor.detach().to("cpu", copy=True).contiguous()
        return full if self.runtime.is_main else None

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()
        self._open.close()


def import_deepspeed(runtime: Runtime) -> Any:
    """Import DeepSpeed for this device and bind it to the process group that already exists."""
    if runtime.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            "fastclip train needs DeepSpeed: pip install 'fastclip-torch[train]'"
        ) from error
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


def convert_to_universal(directory: Path, tag: str, output_tag: str, *, zero_stage: int) -> None:
    """Rewrite a checkpoint so that any world size can load it. One process; a few seconds.

    Raises:
        FileNotFoundError: `directory/tag` does not exist.
    """
    if not (directory / tag).is_dir():
        raise FileNotFoundError(f"no checkpoint {directory / tag}")
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(directory / tag),
        output_folder=str(directory / output_tag),
        num_extract_workers=1,  # one worker runs in this process: no fork beside gloo's threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=zero_stage in (1, 2),
    )
    with weights_only_loading(), contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)
