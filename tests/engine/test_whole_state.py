"""The optimiser's state in one file: each optimiser finds its count of steps where it looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastclip.engine import whole_state


class CountsInState(torch.optim.Optimizer):
    """Looks for its count as DeepSpeed's FusedAdam does, in group and state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        del closure
        for group in self.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = group["step"]
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1


def test_counts_are_restored_in_groups_and_in_states(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    first, second = CountsInState(model.parameters()), CountsInState(model.parameters())
    for _ in range(3):
        first.step()
    whole_state.save(tmp_path, model, first)
    whole_state.load(tmp_path, model, second)
    second.step()
    assert second.param_groups[0]["step"] == 3
    assert [state["step"] for state in second.state.values()] == [4, 4]
    found = whole_state.states(model, second)
    assert [float(state["step"]) for state in found.values()] == [4.0, 4.0]
