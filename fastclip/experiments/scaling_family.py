"""Models of one family over 40 times of compute, and how each of them is trained.

As in arXiv 2103.00020, section 2.4: a ResNet's width, depth and resolution grow together, the text
tower in width alone and in proportion; all models see the same number of images. Resolutions are
multiples of 32, so that of these steps one is large. The learning rate falls with the root of the
width: the paper's falls from 5e-4 at width 64 to 3.6e-4 at 128 (Tables 18 to 20), as 0.47th power.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fastclip.config import TrainConfig, load_config
from fastclip.data.decode import BadSampleError
from fastclip.data.index import CAPTION_EXTENSION, METADATA_EXTENSION, index_shards
from fastclip.data.reader import read_captions
from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.experiments.scaling_groups import GroupTask
from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig
from fastclip.recipes.demo import demo
from fastclip.tokenizer import Tokenizer

_BASE_WIDTH = 16
"""Of RN-Nano, whose learning rate the demo's recipe gives."""

_WARMUP_SHARE = 0.13
"""Of the steps; 60 of 461 in the demo."""

_TASKS = (
    ("fluent-emoji-flat", "style-fluent-emoji-flat", "emoji"),
    ("flagpack", "style-flagpack", "flags"),
)
"""Name, shards and classes: drawing styles that training has not seen."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model of the family."""

    name: str
    """Short name, of its folders and in tables."""

    model: ClipConfig
    """What is trained."""

    seeds: int = 1
    """Trainings that only differ in their seed; their mean is the model's error."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A family and how long its members are trained."""

    images: int
    """That each model sees."""

    seeds: tuple[int, ...]
    """Trainings of each model, from the smallest on."""


PRESETS = {
    "small": Preset(images=30_720, seeds=(1, 1, 1, 1, 1, 1, 1)),
    "long": Preset(images=107_520, seeds=(3, 3, 3, 2, 1, 1, 1)),
}


def _member(image_size: int, layers: tuple[int, int, int, int], width: int) -> Member:
    """Heads have 64 channels in the pooling, as in the paper, and 32 in the narrow text tower."""
    text_width = 8 * width
    return Member(
        name=f"RN-w{width}-r{image_size}",
        model=ClipConfig(
            embed_dim=256,
            vision=ResNetConfig(
                image_size=image_size, layers=layers, width=width, heads=width * 32 // 64
            ),
            text=TextConfig(context_length=32, width=text_width, heads=text_width // 32, layers=3),
        ),
    )


FAMILY = (
    _member(32, (1, 1, 1, 1), 12),
    _member(32, (1, 1, 1, 1), 16),
    _member(64, (1, 1, 1, 1), 16),
    _member(64, (1, 2, 2, 1), 20),
    _member(96, (1, 2, 2, 1), 20),
    _member(96, (1, 2, 3, 2), 24),
    _member(96, (2, 2, 3, 2), 28),
)
"""From the smallest to the largest: 40 times of compute; the third is close to RN-Nano."""


def family(preset: Preset, seeds: int | None) -> tuple[Member, ...]:
    """The models with as many trainings as `preset` says, or `seeds` of each.

    Raises:
        ValueError: `seeds` is less than 1.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds is at least 1, not {seeds}")
    return tuple(
        dataclasses.replace(member, seeds=count if seeds is None else seeds)
        for member, count in zip(FAMILY, preset.seeds, strict=True)
    )


def base_config(data: Path) -> TrainConfig:
    """The demo's recipe with the tasks of this experiment; `member_config` sets the rest.

    Raises:
        FileNotFoundError: `data` is not a folder that ``fastclip data demo`` wrote.
    """
    for needed in (data / "train", data / "style-fluent-emoji-flat"):
        if not needed.exists():
            raise FileNotFoundError(
                f"{needed} does not exist: --data is a folder that `fastclip data demo` wrote"
            )
    config = demo(str(data))
    tasks = tuple(
        ZeroShotTask(
            name=name,
            shards=str(data / shards),
            classes=str(data / "classes" / f"{classes}.json"),
            templates=("{}",),  # bare names, as in the demo's recipe
        )
        for name, shards, classes in _TASKS
    )
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, zero_shot=tasks))


def group_task(data: Path) -> GroupTask:
    """The ten groups of the emoji of an unseen style."""
    shards = str(data / "style-fluent-emoji-flat")
    return GroupTask(
        name="emoji groups",
        shards=shards,
        classes=str(data / "classes" / "emoji.json"),
        known=(str(data / "train"), shards),
    )


def member_config(
    base: TrainConfig, member: Member, seed: int, *, images: int, directory: Path
) -> TrainConfig:
    """How one model is trained: `base` with its model, learning rate, length, seed and folder."""
    steps = max(1, round(images / base.run.global_batch_size))
    return dataclasses.replace(
        base,
        model=member.model,
        optim=dataclasses.replace(
            base.optim,
            learning_rate=base.optim.learning_rate
            * (_BASE_WIDTH / member.model.vision.width) ** 0.5,
            warmup_steps=min(round(_WARMUP_SHARE * steps), steps - 1),
        ),
        run=dataclasses.replace(
            base.run,
            directory=str(directory),
            steps=steps,
            seed=seed,
            evaluate_every_steps=None,
            keep_checkpoints=1,
            tensorboard=False,
        ),
    )


def text_lengths(config: TrainConfig) -> list[int]:
    """Tokens that the training captions are computed with, one after the other.

    Samples without a usable caption are left out, as the loader leaves them out.

    Raises:
        FileNotFoundError, OSError, ValueError: see `index_shards`; or no caption can be used, or
            their lengths depend on the batch.
    """
    if config.data.text == "trimmed":
        raise ValueError(
            "data.text=trimmed computes texts as long as their batch's longest one, which cannot "
            "be counted beforehand; take packed"
        )
    key, context = config.data.caption_key, config.model.text.context_length
    needs = CAPTION_EXTENSION if key == "txt" else METADATA_EXTENSION
    index = index_shards(config.data.train, needs=(needs,))
    captions = []
    for number in range(len(index)):
        try:
            captions.append(read_captions(index[number], key)[0])
        except BadSampleError:
            continue
    if not captions:
        raise ValueError(f"{config.data.train} has no caption under {key}")
    if config.data.text != "packed":
        return [context]
    _, lengths = Tokenizer(context_length=context).encode_batch(captions)
    return lengths.tolist()


def recipe(path: str) -> TrainConfig:
    """The configuration in the file `path`, for ``fastclip train …:recipe --data path``."""
    return load_config(Path(path))
