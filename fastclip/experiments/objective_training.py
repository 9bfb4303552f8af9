"""One run of the comparison of objectives: train, and classify after given numbers of images.

The learning rate is constant after a short warm-up, and what is evaluated is a running average of
the weights over about the last ninth of the steps (polynomial-decay averaging, Shamir and Zhang,
arXiv 1212.1824). So each point of a curve is what a run of that length would give, which a cosine,
made for one length, would not: before its end its weights are noisy.

A run is one process with one thread, so that its numbers do not depend on how many run beside it. A
killed run goes on from its last checkpoint, to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastclip.config import TrainConfig, to_dict
from fastclip.data.index import index_shards
from fastclip.data.loader import TrainLoader
from fastclip.data.reader import read_captions
from fastclip.data.rewriting import write_text
from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.experiments.objective_models import (
    Objective,
    ObjectiveModel,
    Vocabulary,
    convirt_augment,
)
from fastclip.experiments.objective_scoring import LoadedTask, classify, load_task
from fastclip.optim import build_optimizer, set_learning_rate
from fastclip.provenance import note_launch
from fastclip.tokenizer import Tokenizer

logger = logging.getLogger("fastclip")

_CHECKPOINT_STEPS = 64
_AVERAGING = 8.0  # eta of the paper: the weight of step s in the average of t falls as (s / t)^8


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What one run is; two runs of equal settings on the same data give the same numbers."""

    objective: Objective
    seed: int
    """Of the initial weights, the order of the data, the crops and the augmentation."""

    learning_rate: float
    evaluate_at: tuple[int, ...]
    """Steps after which the model is evaluated, rising; the last ends the run."""

    tasks: tuple[str, ...]
    """Names of the zero-shot tasks."""

    variants: bool
    """Also evaluate the other scores of the predictive objectives: the bag of words' each time, the
    language model's after the last step."""

    def __post_init__(self) -> None:
        if not self.evaluate_at or list(self.evaluate_at) != sorted(set(self.evaluate_at)):
            raise ValueError(f"evaluate_at is rising steps, at least one, not {self.evaluate_at}")
        if self.evaluate_at[0] < 1:
            raise ValueError(f"the first evaluation is after step 1 or later: {self.evaluate_at}")


def train_objective(
    settings: RunSettings, config: TrainConfig, folder: Path
) -> list[dict[str, Any]]:
    """Train, or go on training from the last checkpoint.

    Args:
        config: the model, the data, the batch size, the optimiser's other settings and the tasks.
        folder: of this run: ``settings.json``, ``launches.jsonl``, ``results.jsonl``,
            ``checkpoint.safetensors``.

    Returns:
        For each evaluation ``step``, ``images``, ``loss`` (the mean since the last one), and the
        fractions of `classify`.

    Raises:
        ValueError: the folder holds a run of other settings, or of other data.
        FloatingPointError: the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = finished_results(settings, config, folder)
    if results is not None:
        return results
    write_text(folder / "settings.json", _about(settings, config))
    note_launch(folder)
    results = _read_results(folder / "results.jsonl")
    with ObjectiveRun(settings, config, folder) as run:
        results = [row for row in results if row["step"] <= run.step]
        _write_results(folder / "results.jsonl", results)
        while run.step < settings.evaluate_at[-1]:
            run.one_step()
            if run.step in settings.evaluate_at:
                results.append(run.evaluate())
                _write_results(folder / "results.jsonl", results)
            if run.step in settings.evaluate_at or run.step % _CHECKPOINT_STEPS == 0:
                run.save()
    (folder / "checkpoint.safetensors").unlink()
    return results


def finished_results(
    settings: RunSettings, config: TrainConfig, folder: Path
) -> list[dict[str, Any]] | None:
    """What a finished run wrote; None if it has not been finished, or begun.

    Raises:
        ValueError: as `train_objective`.
    """
    path = folder / "settings.json"
    if path.exists() and path.read_text(encoding="utf-8") != _about(settings, config):
        raise ValueError(
            f"{folder} holds a run of other settings or other data than asked for now (see "
            "settings.json there): give another folder with --out, or remove it"
        )
    results = _read_results(folder / "results.jsonl")
    if results and results[-1]["step"] == settings.evaluate_at[-1]:
        return results
    return None


class ObjectiveRun:
    """The parts of a run."""

    def __init__(self, settings: RunSettings, config: TrainConfig, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.total = settings.evaluate_at[-1]
        self.step = 0
        self._loss = torch.zeros((), dtype=torch.float64)  # summed since the last evaluation
        self._losses = 0
        tokenizer = Tokenizer(context_length=config.model.text.context_length)
        self.vocabulary = training_vocabulary(config, tokenizer)
        torch.manual_seed(settings.seed)
        self.model = ObjectiveModel(settings.objective, config.model, self.vocabulary.size)
        self.averaged = ObjectiveModel(settings.objective, config.model, self.vocabulary.size)
        self.averaged.load_state_dict(self.model.state_dict())
        self.averaged.requires_grad_(False).eval()
        self.optim = dataclasses.replace(
            config.optim, learning_rate=settings.learning_rate, schedule="constant"
        )
        self.clipping = config.engine.gradient_clipping
        made = build_optimizer(_groups(self.model, config), self.optim, torch.device("cpu"))
        assert isinstance(made, torch.optim.Optimizer)
        self.optimizer = made
        self.loader = training_loader(settings, config, tokenizer)
        try:
            tasks = {task.name: task for task in config.eval.zero_shot}
            self.tasks = [self._load(tasks[name], config, tokenizer) for name in settings.tasks]
            if (folder / "checkpoint.safetensors").exists():
                self._restore()
        except BaseException:
            self.loader.close()
            raise

    def _load(self, task: ZeroShotTask, config: TrainConfig, tokenizer: Tokenizer) -> LoadedTask:
        return load_task(
            task,
            image_size=config.model.vision.image_size,
            tokenizer=tokenizer,
            vocabulary=self.vocabulary,
        )

    def one_step(self) -> None:
        """Train on the next batch.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        batch = next(self.loader)
        assert batch.ids is not None
        images = batch.images
        if self.settings.objective == "convirt":
            generator = torch.Generator().manual_seed(self.settings.seed << 32 | self.step)
            images = convirt_augment(images, generator)
        set_learning_rate(self.optimizer, self.step, self.optim, self.total)
        tokens = self.vocabulary(batch.tokens, batch.lengths)
        loss = self.model.train()(images, tokens, batch.lengths, batch.ids)
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"the loss of {self.settings.objective} is {float(loss)} at step {self.step} with "
                f"learning rate {self.settings.learning_rate:g}: lower it"
            )
        self.optimizer.zero_grad()
        loss.backward()
        if self.clipping > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
        self.optimizer.step()
        self.step += 1
        self._loss += loss.detach()
        self._losses += 1
        _average(self.averaged, self.model, self.step)

    def evaluate(self) -> dict[str, Any]:
        """Classify by the averaged weights: the row of results of this step."""
        begin = time.perf_counter()
        variants = self.settings.variants
        if self.settings.objective == "language_model":  # whose variants take time
            variants = variants and self.step == self.total
        accuracies = classify(self.averaged, self.tasks, variants=variants)
        loss = float(self._loss / max(self._losses, 1))
        self._loss.zero_()
        self._losses = 0
        images = self.step * self.loader.global_batch_size
        logger.info(
            "%s, seed %d, learning rate %g: %s images, loss %.3f, %s %.2f %% (evaluated in %.0f s)",
            self.settings.objective, self.settings.seed, self.settings.learning_rate,
            f"{images:,}", loss, self.tasks[0].name, 100 * accuracies[f"{self.tasks[0].name}/top1"],
            time.perf_counter() - begin,
        )  # fmt: skip
        return {"step": self.step, "images": images, "loss": loss, **accuracies}

    def save(self) -> None:
        """Write the checkpoint, in one file that takes the former one's place."""
        tensors: dict[str, Tensor] = {"loss": self._loss}
        for name, module in (("model", self.model), ("averaged", self.averaged)):
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
        about = {
            "step": self.step,
            "losses": self._losses,
            "loader": self.loader.state_dict(),
        }
        path = self.folder / "checkpoint.safetensors"
        partial = path.with_suffix(".partial")
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, partial, metadata={"run": json.dumps(about)})
        os.replace(partial, path)

    def _restore(self) -> None:
        path = self.folder / "checkpoint.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it to start anew") from None
        self.loader.load_state_dict(about["loader"])
        for name, module in (("model", self.model), ("averaged", self.averaged)):
            module.load_state_dict(_below(tensors, name))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, "optimizer").items():
            number, _, key = name.partition(".")
            parameter = parameters[int(number)]
            if value.shape == parameter.shape:
                # The fused update walks through weights and statistics in memory's order.
                value = torch.empty_like(parameter).copy_(value)
            state.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._loss, self._losses = tensors["loss"], about["losses"]
        self.step = about["step"]

    def __enter__(self) -> ObjectiveRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.loader.close()


def training_loader(
    settings: RunSettings, config: TrainConfig, tokenizer: Tokenizer
) -> TrainLoader:
    """The batches of a run: for one seed the same pairs, crops and order for all objectives.

    ConVIRT alone takes one sentence of a caption that has several.
    """
    data = dataclasses.replace(
        config.data, text="trimmed", sample_sentence=settings.objective == "convirt"
    )
    return TrainLoader(
        data,
        image_size=config.model.vision.image_size,
        tokenizer=tokenizer,
        batch_size=config.run.global_batch_size,
        rank=0,
        world_size=1,
        seed=settings.seed,
    )


def training_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> Vocabulary:
    """The tokens of all training captions."""
    index = index_shards(config.data.train)
    captions = [
        caption
        for number in range(len(index))
        for caption in read_captions(index[number], config.data.caption_key)
    ]
    rows, lengths = tokenizer.encode_batch(captions)
    inside = torch.arange(rows.shape[1]) < lengths[:, None]
    return Vocabulary(rows[inside], config.model.text.vocab_size)


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices, convolutions and embeddings decay; gains, biases and the temperature do not."""
    parameters = list(model.parameters())
    return [
        {
            "params": [p for p in parameters if (p.ndim > 1) == decays],
            "weight_decay": config.optim.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, step: int) -> None:
    """Take the weights, and BatchNorm's statistics, after `step` (from 1 on) into the average."""
    rate = (_AVERAGING + 1) / (step + _AVERAGING)
    own = averaged.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            own[name].lerp_(value, rate)
        else:  # BatchNorm's count
            own[name].copy_(value)


def _below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


def _about(settings: RunSettings, config: TrainConfig) -> str:
    """What decides a run's numbers."""
    about = {
        **dataclasses.asdict(settings),
        "batch_size": config.run.global_batch_size,
        "data": index_shards(config.data.train).hash,
        "crop_scale": config.data.crop_scale,
        "positives": config.data.positives,
        "gradient_clipping": config.engine.gradient_clipping,
        "model": to_dict(config.model),
        "optim": to_dict(config.optim),
    }
    return json.dumps(about, indent=2) + "\n"


def _read_results(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_results(path: Path, results: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in results))
