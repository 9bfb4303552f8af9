"""A run's configuration: the owners' frozen dataclasses, composed; typed overrides; JSON.

A recipe returns a `TrainConfig`; the command line changes single fields with ``a.b=c``; the result
is dumped beside the run. There is no other place a setting can come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastclip.data.config import DataConfig
from fastclip.data.rewriting import write_text
from fastclip.engine.config import EngineConfig
from fastclip.eval.suite import EvalConfig
from fastclip.models.attention import AttentionConfig
from fastclip.models.config import ClipConfig, Compiled, Recompute
from fastclip.models.presets import PRESETS, preset
from fastclip.optim import OptimConfig
from fastclip.train_step import LossConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long a run is, what it starts from, and what it leaves behind."""

    directory: str = "runs/fastclip"
    """Folder of the run: config, metrics, checkpoints, pictures."""

    global_batch_size: int = 32768
    """Pairs per optimiser step over all ranks; every pair is contrasted with every other."""

    micro_batches: int | Literal["auto"] = 1
    """Parts a rank's share of the batch is computed in; exact, but refused with BatchNorm. auto
    takes as few as fit into the device's memory."""

    steps: int | None = None
    """Optimiser steps of the run; None counts `epochs`."""

    epochs: float = 32.0
    """Passes over the training pairs; used when `steps` is None."""

    seed: int = 0
    """Seeds initialisation, order of the pairs and crops."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the towers run; auto takes a CUDA device when torch sees one."""

    init_from: str | None = None
    """Weights to start from: a file or directory in fastclip, OpenAI, open_clip or HF layout."""

    resume: bool = True
    """Continue from the newest checkpoint in `directory` when there is one."""

    freeze_visual: bool = False
    """Lock the image tower (LiT, arXiv 2111.07991)."""

    freeze_text: bool = False
    """Lock the text tower."""

    activation_checkpointing_visual: Recompute = "none"
    """What of the image tower is computed anew in backward to save memory: selective (what is
    cheap; ViTs, not under ZeRO 3; in what is compiled, the compiler decides anew what that is) or
    full (its blocks)."""

    activation_checkpointing_text: Recompute = "none"
    """The same of the text tower."""

    compile: Compiled = "none"
    """What torch.compile compiles: the towers' blocks, or the towers (not under ZeRO 3). Faster
    steps, minutes before the first."""

    cuda_graphs: bool = False
    """Replay what is compiled as CUDA graphs; for small models, whose launches take longer than
    their work. With one micro-batch, no full recomputation and parameters that are not sharded.
    Packed captions are filled up to a multiple of 1024 tokens, or as data.pack_to_multiple
    says."""

    layer_norm: Literal["torch", "apex"] = "torch"
    """Whose layer normalisation runs; what is compiled fuses torch's with its neighbours."""

    patch_dropout: float = 0.0
    """Share of an image's patches left out in training (FLIP, arXiv 2212.00794); ViTs only."""

    log_every_steps: int = 10
    """Steps between log lines; metrics stay on the device in between."""

    checkpoint_every_steps: int | None = 1000
    """Steps between checkpoints; None for none by steps."""

    checkpoint_every_minutes: float | None = 30.0
    """Minutes between checkpoints, looked at on log steps; None for none by time. One that falls on
    skipped updates, by steps too, is made after them."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""

    max_rollbacks: int = 3
    """How often a launch may go back to its newest checkpoint after engine.max_skipped_steps; it
    goes on with data that it had not reached."""

    evaluate_every_steps: int | None = None
    """Steps between evaluations; None evaluates at the end only."""

    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""

    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batches", "log_every_steps", "keep_checkpoints"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"run.{name} is at least 1, not {value}")
        optional = (
            "steps",
            "checkpoint_every_steps",
            "checkpoint_every_minutes",
            "evaluate_every_steps",
        )
        for name in optional:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"run.{name} is positive or none, not {value}")
        if self.steps is None and not 0 < self.epochs < math.inf:
            raise ValueError(f"run.epochs is positive, not {self.epochs}")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"run.seed is from 0 to 2**62 - 1, not {self.seed}")
        if self.max_rollbacks < 0:
            raise ValueError(f"run.max_rollbacks is at least 0, not {self.max_rollbacks}")
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"run.patch_dropout is in [0, 1), not {self.patch_dropout}")
        if self.freeze_visual and self.freeze_text:
            raise ValueError("run.freeze_visual and run.freeze_text leave nothing to train")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on."""

    model: ClipConfig
    data: DataConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)


def to_dict(config: Any) -> Any:
    """A dataclass as plain JSON-able data; dataclasses in unions carry their type's name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        plain: dict[str, Any] = {"type": type(config).__name__}
        for item in dataclasses.fields(config):
            plain[item.name] = to_dict(getattr(config, item.name))
        return plain
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def from_dict(annotation: Any, value: Any, where: str = "config") -> Any:
    """Rebuild a value of type `annotation` from `to_dict`'s output, checking every field.

    Raises:
        ValueError: a field is unknown, missing or of the wrong type; the message names it.
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _from_union(typing.get_args(annotation), value, where)
    if origin is Literal:
        if value not in typing.get_args(annotation):
            choices = ", ".join(repr(choice) for choice in typing.get_args(annotation))
            raise ValueError(f"{where} is one of {choices}, not {value!r}")
        return value
    if origin is tuple:
        return _from_sequence(typing.get_args(annotation), value, where)
    if dataclasses.is_dataclass(annotation):
        return _from_mapping(annotation, value, where)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is type(None):
        annotation = types.NoneType
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {_type_name(annotation)}, not {value!r}")
    return value


def _from_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in choices:
        return None
    if isinstance(value, dict) and "type" in value:
        named = [c for c in choices if getattr(c, "__name__", None) == value["type"]]
        if named:
            return _from_mapping(named[0], value, where)
    errors = []
    for choice in choices:
        if choice is types.NoneType:
            continue
        try:
            return from_dict(choice, value, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0] if len(errors) == 1 else f"{where}: " + "; or ".join(errors))


def _from_sequence(item_types: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is a list, not {value!r}")
    if len(item_types) == 2 and item_types[1] is Ellipsis:
        item_types = (item_types[0],) * len(value)
    if len(item_types) != len(value):
        raise ValueError(f"{where} has {len(item_types)} items, not {len(value)}")
    pairs = zip(item_types, value, strict=True)
    return tuple(from_dict(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))


def _from_mapping(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is an object with fields, not {value!r}")
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind) if item.init}
    arguments = {}
    for name, item in value.items():
        if name == "type" and "type" not in known:
            continue
        if name not in known:
            raise ValueError(unknown_field(f"{where}.{name}", name, list(known)))
        arguments[name] = from_dict(hints[name], item, f"{where}.{name}")
    missing = [
        name
        for name, item in known.items()
        if name not in arguments
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return kind(**arguments)


def unknown_field(path: str, name: str, known: Sequence[str]) -> str:
    """Message for a field that does not exist, naming the nearest that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
    return f"{path} does not exist; {hint}"


def apply_overrides(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """Change single fields: ``optim.learning_rate=1e-3``, ``model=ViT-B-16``, ``run.steps=none``.

    Values are read by the field's type: numbers (``32_768``, ``1e5`` for whole numbers too),
    true/false, none, text as it is, lists as JSON or separated by commas, nested objects as JSON.

    Raises:
        ValueError: a field does not exist or its value does not fit; the message names both.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ValueError(f"an override is written field.name=value, not {override!r}")
        if path == "model":
            if text not in PRESETS:
                raise ValueError(unknown_field(f"model={text}", text, list(PRESETS)))
            config = dataclasses.replace(config, model=preset(text))
            continue
        config = _replace(config, path.split("."), text, path)
    return config


def _replace(config: Any, names: list[str], text: str, path: str) -> Any:
    known = [item.name for item in dataclasses.fields(config)]
    name = names[0]
    if name not in known:
        raise ValueError(unknown_field(path, name, known))
    current = getattr(config, name)
    annotation = typing.get_type_hints(type(config))[name]
    if len(names) > 1:
        if not dataclasses.is_dataclass(current):
            raise ValueError(f"{path}: {name} is a single value and has no field {names[1]!r}")
        value = _replace(current, names[1:], text, path)
    else:
        value = parse_value(annotation, text, path)
    return dataclasses.replace(config, **{name: value})


def parse_value(annotation: Any, text: str, path: str) -> Any:
    """Read `text` as a value of type `annotation`."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(annotation)
        if types.NoneType in choices and text.lower() in ("none", "null"):
            return None
        errors = []
        for choice in choices:
            if choice is types.NoneType:
                continue
            try:
                return parse_value(choice, text, path)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError("; or ".join(errors))
    if annotation is bool:
        if text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        raise ValueError(f"{path} is true or false, not {text!r}")
    if annotation in (int, float):
        return _parse_number(annotation, text, path)
    if annotation is str:
        return text
    if origin is Literal:
        return _parse_literal(typing.get_args(annotation), text, path)
    if origin is tuple and not text.lstrip().startswith("["):
        items = [item for item in text.split(",") if item]
        types_ = typing.get_args(annotation)
        if len(types_) == 2 and types_[1] is Ellipsis:
            types_ = (types_[0],) * len(items)
        if len(types_) != len(items):
            raise ValueError(f"{path} has {len(types_)} items, separated by commas; got {text!r}")
        return tuple(parse_value(t, item, path) for t, item in zip(types_, items, strict=True))
    try:
        return from_dict(annotation, json.loads(text), path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {text!r} is not valid JSON: {error}") from None


def _parse_number(annotation: type, text: str, path: str) -> int | float:
    if annotation is int:
        with contextlib.suppress(ValueError):  # 1e6 is a whole number too
            return int(text)
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        raise ValueError(f"{path} is {_type_name(annotation)}, not {text!r}") from None
    if annotation is float:
        return number
    if not number.is_integer():
        raise ValueError(f"{path} is a whole number, not {text!r}")
    return int(number)


def _parse_literal(choices: tuple[Any, ...], text: str, path: str) -> Any:
    for choice in choices:
        if str(choice) == text:
            return choice
    raise ValueError(f"{path} is one of {', '.join(str(c) for c in choices)}, not {text!r}")


def _type_name(annotation: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the configuration as JSON, whole or not at all."""
    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_config(path: Path) -> TrainConfig:
    """Read what `save_config` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not describe a `TrainConfig` of this version.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return from_dict(TrainConfig, value, str(path))
