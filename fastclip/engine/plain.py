"""One rank without DeepSpeed: nothing between the step and PyTorch, and no wait for the device."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fastclip.distributed.runtime import Runtime
from fastclip.engine import whole_state
from fastclip.engine.base import Engine, on_the_host
from fastclip.engine.config import EngineConfig
from fastclip.engine.step_guard import StepInfo
from fastclip.models.clip import Clip, ClipOutput
from fastclip.tokenizer.packing import PackedTokens


class PlainEngine(Engine):
    """A model and its optimiser on one device."""

    name: ClassVar[str] = "plain"

    def __init__(
        self,
        model: Clip,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        runtime: Runtime,
        *,
        micro_batches: int = 1,
    ) -> None:
        if runtime.world_size != 1:
            raise ValueError(
                f"engine.backend=plain is for one rank, not {runtime.world_size}: leave it at auto"
            )
        super().__init__(model, config, runtime, micro_batches, zero_stage=0)
        self._model = model
        self._optimizer = optimizer

    @property
    def module(self) -> Clip:
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def forward(self, images: Tensor | None, tokens: Tensor | PackedTokens | None) -> ClipOutput:
        return self._model(images=images, tokens=tokens)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if self.loss_scale.enabled:
            loss = loss * self.loss_scale.value
        loss.backward()

    def _update(self) -> StepInfo:
        info = self._prepare_unsharded_update()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return info

    def save(self, directory: Path, tag: str) -> None:
        whole_state.save(directory / tag, self._model, self._optimizer)

    def load(self, directory: Path, tag: str) -> None:
        whole_state.load(directory / tag, self._model, self._optimizer)

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: on_the_host(tensor) for name, tensor in self._model.state_dict().items()}

    def close(self) -> None:
        pass
