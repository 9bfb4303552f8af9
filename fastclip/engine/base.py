"""What both engines have in common: the face, the order of calls, and the update without shards."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import record_function

from fastclip.distributed.runtime import Runtime
from fastclip.engine.config import AUTOCAST_DTYPES, EngineConfig
from fastclip.engine.step_guard import LossScale, StepGuard, StepInfo
from fastclip.models.clip import Clip, ClipOutput
from fastclip.optim import GuardedOptimizer
from fastclip.tokenizer.packing import PackedTokens


class Engine(abc.ABC):
    """A model and its optimiser.

    One optimiser step is: for each micro-batch `forward`, then `backward` on its loss; after the
    last one `step`. Gradients of the micro-batches add up (they are not averaged over them), and
    are averaged over ranks, which is what the losses' rank convention expects.

    Parameters live in fp32 (or as the optimiser wants them), and reduced precision is torch
    autocast inside the model's forward: the temperature stays fp32 in every mode.
    """

    name: ClassVar[str]

    def __init__(
        self,
        model: Clip,
        config: EngineConfig,
        runtime: Runtime,
        micro_batches: int,
        zero_stage: int,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.micro_batches = micro_batches
        self.zero_stage = zero_stage
        # DeepSpeed's sharded optimisers ask the host for the scale, and tell it the norm.
        where = torch.device("cpu") if zero_stage else runtime.device
        self.loss_scale = LossScale(
            config.initial_loss_scale, config.loss_scale_window, config.precision == "fp16", where
        )
        self.guard = StepGuard(config, where)
        self._backwards = 0
        model.autocast_dtype = AUTOCAST_DTYPES[config.precision]

    @property
    @abc.abstractmethod
    def module(self) -> Clip:
        """The model. Under ZeRO-3 its parameters are empty outside its own forward."""

    @property
    @abc.abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser inside; its `param_groups` carry the learning rates."""

    @abc.abstractmethod
    def forward(self, images: Tensor | None, tokens: Tensor | PackedTokens | None) -> ClipOutput:
        """Run the towers; see `Clip.forward` for shapes."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's `loss` (shape []) to those of the others."""
        self._backwards += 1
        if self._backwards > self.micro_batches:
            raise RuntimeError(
                f"backward call {self._backwards} of a step with {self.micro_batches} micro-batches"
            )
        with record_function("fastclip::backward"):
            self._backward(loss, last=self._backwards == self.micro_batches)

    def step(self) -> StepInfo:
        """Update the parameters; a step whose gradient is not finite is skipped on every rank.

        Without sharding, and with an optimiser that takes `found_inf`, nothing of ours here waits
        for the device.
        """
        if self._backwards != self.micro_batches:
            raise RuntimeError(
                f"step after {self._backwards} of {self.micro_batches} micro-batches: call "
                "backward for each of them first"
            )
        self._backwards = 0
        with record_function("fastclip::update"):
            info = self._update()
        # Not where an unusual gradient was refused: that one did not overflow.
        self.loss_scale.update(~info.gradient_norm.isfinite())
        self.guard.count(info.applied)
        return info

    @abc.abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None: ...

    @abc.abstractmethod
    def _update(self) -> StepInfo: ...

    def _prepare_unsharded_update(self) -> StepInfo:
        """Judge the whole gradient; tell the optimiser what to divide it by, or to do nothing."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        # In fp32, also of gradients in bfloat16.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.linalg.vector_norm(torch.stack(norms)) / self.loss_scale.value
        good = self.guard.judge(norm)
        divisor = self.loss_scale.value if self.loss_scale.enabled else None
        if self.config.gradient_clipping > 0:
            excess = ((norm + 1e-6) / self.config.gradient_clipping).clamp(min=1.0)
            divisor = excess if divisor is None else divisor * excess
        if takes_found_inf(self.optimizer):
            # The update's own kernels divide by one, and do nothing where the other is 1.
            vars(self.optimizer).update(grad_scale=divisor, found_inf=(~good).float())
        elif not bool(good):
            for parameter in parameters:
                parameter.grad = None  # an optimiser step without gradients changes nothing
        elif divisor is not None:
            for gradient in gradients:
                gradient.div_(divisor)
        return StepInfo(torch.where(norm.isfinite(), norm, torch.inf), good)

    def raise_if_diverged(self) -> None:
        """Raise FloatingPointError if too many updates in a row were skipped; waits for them."""
        self.guard.raise_if_diverged()

    def state_dict(self) -> dict[str, Any]:
        """Loss scale and guard as plain data, the same on every rank."""
        return {"loss_scale": self.loss_scale.state_dict(), "guard": self.guard.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.loss_scale.load_state_dict(state["loss_scale"])
        self.guard.load_state_dict(state["guard"])

    @abc.abstractmethod
    def save(self, directory: Path, tag: str) -> None:
        """Write the optimiser's state into `directory/tag`. Collective."""

    @abc.abstractmethod
    def load(self, directory: Path, tag: str) -> None:
        """Restore what `save` wrote, or its universal form. Collective; the engine must be new.

        The model's weights are those it was built with: read them into it before.
        """

    @abc.abstractmethod
    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The whole model in fp32 on the CPU: on rank 0 a dict, elsewhere None. Collective."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the engine holds beside model and optimiser."""


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its `step` reads `grad_scale` and `found_inf`, tensors on the device, and obeys."""
    if type(optimizer) is torch.optim.AdamW:
        return bool(optimizer.defaults["fused"])
    return isinstance(optimizer, GuardedOptimizer)


def on_the_host(tensor: Tensor) -> Tensor:
    """A copy for a file: floating point in fp32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
