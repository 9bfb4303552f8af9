"""What is done with a trained model outside the loop: load it, evaluate it, draw its run."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from fastclip.checkpoint import complete_checkpoints
from fastclip.config import apply_overrides, from_dict, load_config
from fastclip.distributed.runtime import initialise, shutdown
from fastclip.eval.suite import run_suite
from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig
from fastclip.tokenizer import Tokenizer


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest one of the run in that folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if (path / "model.safetensors").is_file() and (path / "model.json").is_file():
        return path
    names = complete_checkpoints(path / "checkpoints")
    if not names:
        raise FileNotFoundError(
            f"{path} is neither a checkpoint (model.safetensors, model.json) nor a run with a "
            "complete one under checkpoints/"
        )
    return path / "checkpoints" / names[-1]


def load_trained(path: Path) -> tuple[Clip, Path]:
    """The model of a run or checkpoint, in evaluation mode on the CPU, and where it was found."""
    checkpoint = find_checkpoint(path)
    description = json.loads((checkpoint / "model.json").read_text(encoding="utf-8"))
    model = Clip(from_dict(ClipConfig, description, str(checkpoint / "model.json")))
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return model.eval(), checkpoint


def run_folder(path: Path) -> Path:
    """The run a path belongs to: itself, or the folder above `checkpoints/step-…`."""
    return path if (path / "config.json").is_file() else path.parent.parent


def evaluate(
    path: Path, overrides: list[str], *, device: str = "auto"
) -> tuple[dict[str, float], bool]:
    """Run a run's evaluation suite on its weights; returns the numbers and whether this is rank 0.

    Works alone or under a launcher. Overrides change the run's config (``eval.batch_size=512``).
    """
    config = apply_overrides(load_config(run_folder(path) / "config.json"), overrides)
    runtime = initialise(device)
    try:
        model, _ = load_trained(path)
        metrics = run_suite(
            model.to(runtime.device),
            Tokenizer(context_length=config.model.text.context_length),
            config.eval,
            image_size=config.model.vision.image_size,
            runtime=runtime,
        )
        return metrics, runtime.is_main
    finally:
        shutdown()
