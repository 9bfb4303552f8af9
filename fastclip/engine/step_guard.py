"""Whether an update is good, decided on the device: nobody waits for it.

The loss scale of fp16, the gradient's norm and the counts of skipped updates are tensors there, and
are read when somebody logs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.engine.config import EngineConfig

_STEPS_TO_KNOW = 20
"""Good updates before a norm can be called unusual."""

_MEMORY = 0.02
"""Weight of the newest norm in the usual one."""


@dataclass(frozen=True)
class StepInfo:
    """What one optimiser step did; tensors of shape [], on the device where it is known first."""

    gradient_norm: Tensor
    """Global L2 norm of the averaged gradient before clipping; inf if it was not finite. Under
    Muon DeepSpeed tells that of its orthogonalised updates instead."""

    applied: Tensor
    """bool; False when the update was skipped."""


class LossScale:
    """Dynamic loss scale for fp16, which every rank moves in the same way.

    Attributes:
        value: fp32 [], 1 where it is not enabled.
        good_steps: int32 [], since it changed last.
    """

    def __init__(
        self, initial: float, window: int, enabled: bool, device: torch.device | None = None
    ) -> None:
        self.value = torch.tensor(initial if enabled else 1.0, device=device)
        self.window = window
        self.enabled = enabled
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """Halve it (not below 1) after an overflow; double it after a window without one."""
        if not self.enabled:
            return
        good_steps = torch.where(overflow, 0, self.good_steps + 1)
        full = good_steps == self.window
        halved = (self.value / 2.0).clamp(min=1.0)
        grown = torch.where(full, self.value * 2.0, self.value)
        self.value.copy_(torch.where(overflow, halved, grown))
        self.good_steps.copy_(torch.where(full, 0, good_steps))

    def state_dict(self) -> dict[str, float]:
        """Empty where it is not enabled: a later fp16 run begins with its own scale."""
        if not self.enabled:
            return {}
        return {"value": float(self.value), "good_steps": int(self.good_steps)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` gave, where both runs scale their loss."""
        if self.enabled and state:
            self.value.fill_(float(state["value"]))
            self.good_steps.fill_(int(state["good_steps"]))


class StepGuard:
    """Refuses updates whose gradient is not finite, or unusually large where that is asked for.

    Attributes:
        skipped_steps: int64 [], updates refused since this guard was made: by a launch, or since
            it went back to a checkpoint.
    """

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self.config = config
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._usual = torch.zeros((), device=device)  # mean logarithm of the norms
        self._known = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, norm: Tensor) -> Tensor:
        """Whether an update with this gradient norm is to be made, bool []."""
        good = norm.isfinite()
        if self.config.outlier_factor == 0.0:
            return good
        logarithm = norm.clamp(min=torch.finfo(norm.dtype).tiny).log()
        usual = logarithm <= self._usual + math.log(self.config.outlier_factor)
        good = good & (usual | (self._known < _STEPS_TO_KNOW))
        weight = (1.0 / (self._known + 1)).clamp(min=_MEMORY)
        moved = self._usual + weight * (logarithm - self._usual)
        self._usual.copy_(torch.where(good, moved, self._usual))
        self._known.add_(good)
        return good

    def count(self, applied: Tensor) -> None:
        """Take note of an update that was made or skipped."""
        self.skipped_steps.add_(~applied)
        self._in_a_row.copy_(torch.where(applied, 0, self._in_a_row + 1))

    def skipped_in_a_row(self) -> int:
        """Updates skipped since the last one that was made; waits for the device."""
        return int(self._in_a_row)

    def raise_if_diverged(self) -> None:
        """Read the counts from the device.

        Raises:
            FloatingPointError: too many updates in a row were skipped.
        """
        in_a_row = self.skipped_in_a_row()
        if in_a_row >= self.config.max_skipped_steps:
            raise FloatingPointError(
                f"{in_a_row} updates in a row were skipped, their gradients being not finite or "
                "too large: training has diverged. Lower optim.learning_rate, set "
                "engine.gradient_clipping, or use engine.precision=bf16 or fp32; resume from the "
                "last checkpoint."
            )

    def state_dict(self) -> dict[str, float]:
        """The usual norm, as plain data; counts begin anew."""
        return {"usual": float(self._usual), "known": int(self._known)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` gave."""
        self._usual.fill_(float(state["usual"]))
        self._known.fill_(int(state["known"]))
