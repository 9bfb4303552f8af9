"""The state of an optimiser that is not sharded: one safetensors file, by parameters' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastclip.engine import universal
from fastclip.optim import GuardedOptimizer

FILE_NAME = "optimizer.safetensors"

States = dict[str, dict[str, Tensor]]
"""Parameter's name -> what the optimiser keeps for it, as ``exp_avg`` -> a tensor of its shape."""


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimiser's state into `directory`."""
    flat = {
        f"{name}/{key}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, state in states(model, optimizer).items()
        for key, tensor in state.items()
    }
    save_file(flat, directory / FILE_NAME)


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what `save` wrote, or the state in a checkpoint of DeepSpeed's universal form.

    Raises:
        FileNotFoundError: `directory` holds neither.
        ValueError: the state is another optimiser's, or of another set of trained parameters.
    """
    path = directory / FILE_NAME
    if not path.is_file() and not (directory / "zero").is_dir():
        raise FileNotFoundError(f"{directory} has no {FILE_NAME}, nor DeepSpeed's files")
    stored = read(path) if path.is_file() else universal.read(directory)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    if stored and stored.keys() != trained:
        name = min(stored.keys() ^ trained)
        where = (
            "is trained here, and was not there" if name in trained else "was trained there only"
        )
        raise ValueError(f"{directory} has the optimiser state of other parameters: {name} {where}")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[parameter] in stored:
                _restore(optimizer, group, parameter, stored[names[parameter]], directory)


def read(path: Path) -> States:
    """The states in a file that `save` wrote."""
    found: States = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping, though it has keys)
            name, _, kind = key.rpartition("/")
            found.setdefault(name, {})[kind] = file.get_tensor(key)
    return found


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> States:
    """What `optimizer` keeps for each of the model's parameters; empty before its first step."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: States = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {k: v for k, v in optimizer.state.get(parameter, {}).items() if v is not None}
            if state and "step" in group:  # apex counts there, DeepSpeed begins from there
                state["step"] = torch.tensor(max(float(group["step"]), float(state.get("step", 0))))
            found[names[parameter]] = {k: torch.as_tensor(v) for k, v in state.items()}
    # An update is made of all parameters or of none. (DeepSpeed's FusedAdam counts it in the last
    # parameter of a group alone.)
    counts = [state["step"].float().reshape(()) for state in found.values() if "step" in state]
    if counts:
        count = torch.stack(counts).max()
        for state in found.values():
            if "step" in state:
                state["step"] = count.clone()  # a file has no place for shared tensors
    return {name: state for name, state in found.items() if state}


def _restore(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
    stored: dict[str, Tensor],
    directory: Path,
) -> None:
    expected = {"exp_avg", "exp_avg_sq"}  # of AdamW and LAMB, whoever wrote them
    if stored.keys() - {"step"} != expected:
        raise ValueError(
            f"{directory} holds the state of another optimiser ({', '.join(sorted(stored))}, and "
            f"{type(optimizer).__name__} keeps {', '.join(sorted(expected))}): resume with its "
            "optim.algorithm, or start a new run from its weights with run.init_from"
        )
    # Statistics have their parameter's dtype: fp32, or bfloat16 in the compact optimiser.
    state: dict[str, Any] = {
        key: stored[key].reshape(parameter.shape).to(parameter.device, parameter.dtype)
        for key in expected
    }
    if isinstance(optimizer, torch.optim.AdamW | GuardedOptimizer):
        state["step"] = stored["step"].reshape(()).float().clone().to(parameter.device)
    else:  # apex's count per group, DeepSpeed's also per parameter, on the host
        group["step"] = state["step"] = int(stored["step"])
    optimizer.state[parameter] = state
