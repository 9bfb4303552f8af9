"""DeepSpeed's universal checkpoint form, in which every engine, ZeRO stage and world size can load.

```
zero/<parameter's name>/{fp32,exp_avg,exp_avg_sq,step}.pt      one whole tensor each
zero/optimizer_state.pt, *mp_rank_00_model_states.pt           counts that DeepSpeed asks for
```

DeepSpeed makes it from sharded checkpoints of one stage, for the same stage; `complete` turns that
into what every stage can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

LAYOUT_VERSION = "0.19.8"
"""The DeepSpeed whose layout this is."""

_TENSORS = ("exp_avg", "exp_avg_sq")


def write(
    directory: Path, weights: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write fp32 `weights` and `states` of the trained parameters, by name.

    Raises:
        ValueError: the states are not Adam's (or LAMB's).
    """
    for name, state in states.items():
        if missing := {*_TENSORS, "step"} - state.keys():
            raise ValueError(
                f"the optimiser's state has no {', '.join(sorted(missing))}: it can only be "
                "resumed with the same engine.zero_stage and number of ranks"
            )
        folder = directory / "zero" / name
        folder.mkdir(parents=True)
        for key in _TENSORS:
            torch.save(_entry(state[key]), folder / f"{key}.pt")
        torch.save(_entry(weights[name]), folder / "fp32.pt")


def complete(directory: Path, step: Tensor) -> None:
    """Make what is there readable for every stage; `step` is the number of updates made."""
    folders = _folders(directory)
    step = step.float().reshape(())
    # DeepSpeed's conversion of stage 3 writes bare tensors, all of them.
    bare = not isinstance(torch.load(folders[0] / "fp32.pt", weights_only=True), dict)
    for folder in folders:
        torch.save(step, folder / "step.pt")
        for key in (*_TENSORS, "fp32") if bare else ():
            torch.save(_entry(_tensor(folder / f"{key}.pt")), folder / f"{key}.pt")
    no_settings: dict[str, object] = {}
    counts = {
        "ds_version": LAYOUT_VERSION,
        # Stages 1 and 2 read as many groups as are listed here; there are no more than parameters.
        "param_groups": [no_settings] * len(folders),
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [no_settings]},
    }
    torch.save(counts, directory / "zero" / "optimizer_state.pt")
    progress = {
        "module": {},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": int(step),
        "skipped_steps": 0,
    }
    for prefix in ("", "zero_pp_rank_0_"):
        torch.save(progress, directory / f"{prefix}mp_rank_00_model_states.pt")


def read(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state of every trained parameter, by name.

    Raises:
        FileNotFoundError: `directory` is no checkpoint of this form.
    """
    return {
        folder.name: {key: _tensor(folder / f"{key}.pt") for key in (*_TENSORS, "step")}
        for folder in _folders(directory)
    }


def _folders(directory: Path) -> list[Path]:
    # DeepSpeed also writes weights of what is not trained, and buffers.
    folders = sorted(path.parent for path in (directory / "zero").glob("*/exp_avg.pt"))
    if not folders:
        raise FileNotFoundError(f"{directory} is no checkpoint of DeepSpeed's universal form")
    return folders


def _entry(tensor: Tensor) -> dict[str, object]:
    return {"param": tensor.detach().float().cpu().contiguous(), "cat_dim": 0}


def _tensor(path: Path) -> Tensor:
    value = torch.load(path, weights_only=True, map_location="cpu")
    return torch.as_tensor(value["param"] if isinstance(value, dict) else value)
