"""Runs' folders with checkpoints, as training leaves them, of small models without training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastclip.config import save_config, to_dict
from fastclip.eval.suite import EvalConfig
from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.models.clip import Clip
from fastclip.recipes import RECIPES


def write_run(
    folder: Path, *, train: str, tasks: Sequence[ZeroShotTask], seeds: Sequence[int] = (0,)
) -> Path:
    """A run whose checkpoints of steps 1, 2, … hold the weights that these seeds draw."""
    config = RECIPES["smoke"](train)
    vision = dataclasses.replace(config.model.vision, layers=1)
    model = dataclasses.replace(
        config.model, vision=vision, text=dataclasses.replace(config.model.text, layers=1)
    )
    config = dataclasses.replace(
        config,
        model=model,
        eval=EvalConfig(zero_shot=tuple(tasks), batch_size=8, workers=1),
        run=dataclasses.replace(config.run, directory=str(folder)),
    )
    folder.mkdir(parents=True)
    save_config(config, folder / "config.json")
    for step, seed in enumerate(seeds, start=1):
        torch.manual_seed(seed)
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        save_file(Clip(model).state_dict(), checkpoint / "model.safetensors")
        (checkpoint / "model.json").write_text(json.dumps(to_dict(model)))
        (checkpoint / "fastclip.json").write_text("{}")
    return folder
