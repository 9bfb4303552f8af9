"""What is done with a trained model outside the loop: load it, evaluate it, draw its run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastclip.checkpoint_folder import complete_checkpoints
from fastclip.config import TrainConfig, apply_overrides, from_dict, load_config
from fastclip.data.pixels import PixelReader
from fastclip.data.transforms import centre_crop
from fastclip.distributed.runtime import Runtime, initialise, shutdown
from fastclip.eval.answers import answer_task
from fastclip.eval.evaluator import Evaluator
from fastclip.eval.prompts import fill
from fastclip.eval.suite import run_suite
from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig
from fastclip.report.contact_sheet import Hit, draw_contact_sheet
from fastclip.report.learning_curve import draw_learning_curve, read_metrics
from fastclip.tokenizer import Tokenizer

_SHEET_TEXTS, _SHEET_IMAGES = 10, 6


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
    """The model of a run or checkpoint, in evaluation mode on the CPU, and where it was found.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files are damaged or do not fit together.
    """
    checkpoint = find_checkpoint(path)
    description = json.loads((checkpoint / "model.json").read_text(encoding="utf-8"))
    model = Clip(from_dict(ClipConfig, description, str(checkpoint / "model.json")))
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{checkpoint / 'model.safetensors'} cannot be loaded: {error}") from None
    return model.eval(), checkpoint


def run_folder(path: Path) -> Path:
    """The run a path belongs to: itself, or the folder above `checkpoints/step-…`.

    Raises:
        FileNotFoundError: it belongs to none.
    """
    for folder in (path, path.parent.parent):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{path} is neither a run's folder (config.json) nor a checkpoint in one"
    )


def run_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a run, or of the run that a checkpoint is in, for evaluating its model.

    Args:
        overrides: of fields below ``eval`` and ``data``, e.g. ``eval.batch_size=512``.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: an override does not fit, or is of a field that an evaluation does not read.
    """
    for override in overrides:
        if not override.startswith(("eval.", "data.")):
            raise ValueError(
                f"{override}: a trained model is evaluated as it was trained; fields below eval "
                "and data can be changed"
            )
    config = apply_overrides(load_config(run_folder(path) / "config.json"), list(overrides))
    config.data.configure_remote()
    return config


def make_evaluator(model: Clip, config: TrainConfig, runtime: Runtime) -> Evaluator:
    """A trained model as its run's config has it evaluated; moved to the runtime's device."""
    return Evaluator(
        model=model.to(runtime.device),
        tokenizer=Tokenizer(context_length=model.config.text.context_length),
        runtime=runtime,
        batch_size=config.eval.batch_size,
        workers=config.eval.workers,
        apply_orientation=config.data.apply_orientation,
    )


def evaluate(
    path: Path, overrides: Sequence[str], *, device: str = "auto"
) -> tuple[dict[str, float], bool]:
    """Run a run's evaluation suite on its weights; returns the numbers and whether this is rank 0.

    Works alone or under a launcher. Overrides change the run's config (``eval.batch_size=512``).
    """
    config = run_config(path, overrides)
    runtime = initialise(device)
    try:
        model, _ = load_trained(path)
        metrics = run_suite(make_evaluator(model, config, runtime), config.eval)
        return metrics, runtime.is_main
    finally:
        shutdown()


def show(path: Path) -> list[str]:
    """Draw a run: its learning curve, and a contact sheet for each zero-shot task.

    Returns:
        One line for each picture written into the run's folder.

    Raises:
        FileNotFoundError: there is no run, no metrics or no checkpoint.
    """
    folder = run_folder(path)
    config = run_config(path)
    model, checkpoint = load_trained(path)
    evaluator = make_evaluator(model, config, Runtime.alone(torch.device("cpu")))
    written = []
    curve = folder / "learning_curve.png"
    draw_learning_curve(read_metrics(folder / "metrics.jsonl"), curve)
    written.append(f"learning curve: {curve}")
    for task in config.eval.zero_shot:
        sheet = folder / f"contact_sheet_{task.name}.png"
        rows = _search(evaluator, task)
        draw_contact_sheet(f"{task.name}, {checkpoint.name}: green is right", rows, sheet)
        written.append(f"contact sheet: {sheet}")
    return written


def _search(evaluator: Evaluator, task: ZeroShotTask) -> list[tuple[str, list[Hit]]]:
    """For some of the classes that the task's images show, the images that fit their names best."""
    found = answer_task(evaluator, task)
    rows = []
    with PixelReader(
        workers=evaluator.workers, apply_orientation=evaluator.apply_orientation
    ) as reader:
        for place, scores, places in found.nearest_images(_SHEET_TEXTS, _SHEET_IMAGES):
            numbers = [found.numbers[row] for row in places]
            pixels, _ = reader.read(found.index, numbers, evaluator.image_size, centre_crop)
            hits = [
                Hit(image, score, int(found.target[row]) == place)
                for image, score, row in zip(pixels, scores, places, strict=True)
            ]
            rows.append((fill(found.templates, found.classes.names[place])[0], hits))
    return rows
