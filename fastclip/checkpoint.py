"""Checkpoints of a run: one directory per step, complete or absent.

```
checkpoints/latest                  name of the newest complete checkpoint
checkpoints/step-00000500/
    fastclip.json                   step, world size, ZeRO stage, loader state (written last)
    model.safetensors  model.json   the whole model in fp32, for evaluation, export and fine-tuning
    rank-00000.pt                   random generators of each rank
    optimizer.safetensors           the optimiser's state, where it is not sharded
    *_states.pt                     DeepSpeed's own files, where it is
```

A checkpoint is written under another name and renamed when every rank is done, so that a killed
process leaves either the old state or the new one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file

from fastclip.checkpoint_folder import (
    complete_checkpoints,
    flush,
    make_way,
    prune,
    step_tag,
)
from fastclip.data.rewriting import write_text
from fastclip.distributed.collectives import barrier, broadcast_object
from fastclip.distributed.runtime import Runtime
from fastclip.engine import Engine, convert_to_universal
from fastclip.models.clip import Clip

logger = logging.getLogger("fastclip")

FORMAT_VERSION = 4


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint and how it has to be loaded."""

    directory: Path
    """The run's `checkpoints` directory."""

    tag: str
    step: int
    pairs: int
    """That the run has trained on."""

    loader_state: dict[str, Any]
    engine_state: dict[str, Any]
    same_world: bool
    """True when this launch has as many ranks as the one that wrote it: generators are restored."""

    load_tag: str
    """What the engine loads: the checkpoint itself, or its universal conversion."""

    @property
    def universal(self) -> bool:
        """True when the engine must load the conversion: another world size, stage or engine."""
        return self.load_tag != self.tag


def save_checkpoint(
    directory: Path,
    engine: Engine,
    runtime: Runtime,
    *,
    step: int,
    pairs: int,
    loader_state: dict[str, Any],
    model_config: dict[str, Any],
    keep: int | None,
    algorithm: str = "adamw",
    frozen: Sequence[str] = (),
) -> Path:
    """Write the checkpoint of `step`, point `latest` at it. Collective.

    Args:
        keep: how many of the newest stay; None: all.
    """
    tag = step_tag(step)
    partial = f".partial-{tag}"
    final = directory / tag
    if runtime.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".partial-*"):
            shutil.rmtree(stale)
    barrier()
    if runtime.is_main:
        (directory / partial).mkdir()
    barrier()
    engine.save(directory, partial)
    torch.save(_generators(runtime), directory / partial / f"rank-{runtime.rank:05d}.pt")
    weights = engine.full_state_dict()
    barrier()
    if runtime.is_main:
        assert weights is not None
        save_file(weights, directory / partial / "model.safetensors")
        _write_json(directory / partial / "model.json", model_config)
        meta = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": runtime.world_size,
            "pairs": pairs,
            "zero_stage": engine.zero_stage,
            "algorithm": algorithm,
            "frozen": list(frozen),
            "engine": engine.state_dict(),
            "loader": loader_state,
            "torch": torch.__version__,
        }
        _write_json(directory / partial / "fastclip.json", meta)
        flush(directory / partial)
        make_way(directory, tag)
        os.replace(directory / partial, final)
        write_text(directory / "latest", tag + "\n")
        prune(directory, keep)
    barrier()
    return final


def find_resume_point(
    directory: Path,
    runtime: Runtime,
    zero_stage: int,
    model_config: dict[str, Any],
    tag: str | None = None,
    *,
    algorithm: str = "adamw",
    frozen: Sequence[str] = (),
) -> ResumePoint | None:
    """The newest complete checkpoint (or the one named `tag`), None when there is none. Collective.

    A checkpoint of another world size or `zero_stage` (`Engine.zero_stage`) is converted to
    DeepSpeed's universal form first, by rank 0.

    Raises:
        FileNotFoundError: `tag` was asked for and is not a complete checkpoint.
        ValueError: written for another model, by another version of fastclip, or by an optimiser
            whose state this `algorithm` cannot take over, or with other towers `frozen`.
    """
    return _decided_by_main(
        runtime,
        lambda: _find_resume_point(
            directory, runtime.world_size, zero_stage, model_config, tag, algorithm, list(frozen)
        ),
    )


def _find_resume_point(
    directory: Path,
    world_size: int,
    zero_stage: int,
    model_config: dict[str, Any],
    tag: str | None,
    algorithm: str,
    frozen: list[str],
) -> ResumePoint | None:
    complete = complete_checkpoints(directory)
    if tag is None and not complete:
        return None
    if tag is not None and tag not in complete:
        have = ", ".join(complete) or "none"
        raise FileNotFoundError(f"no complete checkpoint {directory / tag}; there are: {have}")
    chosen = tag if tag is not None else complete[-1]
    meta = _read_json(directory / chosen / "fastclip.json")
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{directory / chosen} has format version {version}; this fastclip "
            f"reads {FORMAT_VERSION}: use the version that wrote it"
        )
    differences = _differences(_read_json(directory / chosen / "model.json"), model_config)
    if differences:
        raise ValueError(
            f"{directory / chosen} holds another model ({'; '.join(differences)}): resume with its "
            "settings, or choose another run.directory"
        )
    if (meta["algorithm"] == "muon") != (algorithm == "muon"):
        raise ValueError(
            f"{directory / chosen} was written with optim.algorithm={meta['algorithm']}, whose "
            f"state {algorithm} cannot take over: resume with it, or start a new run from its "
            f"weights with run.init_from={directory / chosen}"
        )
    if meta["frozen"] != frozen:
        raise ValueError(
            f"{directory / chosen} was written with frozen towers {meta['frozen']}, and this run "
            f"has {frozen}: set run.freeze_visual and run.freeze_text as then, or start a new run "
            f"from its weights with run.init_from={directory / chosen}"
        )
    same_world = meta["world_size"] == world_size
    written_at = meta["zero_stage"]
    load_tag = chosen
    if written_at != zero_stage or (zero_stage > 0 and not same_world):
        if algorithm == "muon":
            raise ValueError(
                f"{directory / chosen} was written by {meta['world_size']} rank(s) at ZeRO stage "
                f"{written_at}, and this run has {world_size} at {zero_stage}: Muon's state goes "
                "on at the same ones only"
            )
        load_tag = f"{chosen}-universal"
        if not (directory / load_tag).is_dir():
            logger.info(
                "%s was written by %d rank(s) at ZeRO stage %d, this run has %d at %d: converting",
                chosen,
                meta["world_size"],
                written_at,
                world_size,
                zero_stage,
            )
            source = directory / chosen
            with _damage_explained(source, source):
                convert_to_universal(source, directory / load_tag, zero_stage=written_at)
    return ResumePoint(
        directory,
        chosen,
        meta["step"],
        meta["pairs"],
        meta["loader"],
        meta["engine"],
        same_world,
        load_tag,
    )


def load_weights(point: ResumePoint, model: Clip) -> None:
    """Read the checkpoint's weights and buffers into `model`, before its engine is made.

    Raises:
        ValueError: the file is damaged.
    """
    path = point.directory / point.tag / "model.safetensors"
    with _damage_explained(path, point.directory / point.tag):
        load_model(model, path)


def load_checkpoint(point: ResumePoint, engine: Engine, runtime: Runtime) -> None:
    """Restore optimiser, loss scale and generators. Collective; the engine must be new.

    Raises:
        ValueError: a file is damaged, or holds more than tensors and plain data.
    """
    source = point.directory / point.load_tag
    way_out = _EARLIER if point.load_tag == point.tag else f"convert {point.tag} anew"
    with _damage_explained(source, source, way_out):
        engine.load(point.directory, point.load_tag)
    engine.load_state_dict(point.engine_state)
    if point.same_world:
        path = point.directory / point.tag / f"rank-{runtime.rank:05d}.pt"
        with _damage_explained(path, point.directory / point.tag):
            _restore_generators(torch.load(path, weights_only=True), runtime)


_EARLIER = "resume from the checkpoint before it"


@contextlib.contextmanager
def _damage_explained(path: Path, remove: Path, then: str = _EARLIER) -> Iterator[None]:
    try:
        yield
    except (
        AssertionError,  # DeepSpeed's word for files that are missing
        EOFError,
        FileNotFoundError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        if "gloo" in str(error) or "NCCL" in str(error):
            raise  # another rank has gone; the files may be well
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be loaded ({reason}): if it is damaged, remove {remove} to {then}"
        ) from error


def _generators(runtime: Runtime) -> dict[str, Any]:
    version, state, gauss = random.getstate()
    generators: dict[str, Any] = {
        "python": [version, list(state), gauss],
        "torch": torch.get_rng_state(),
    }
    if runtime.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(runtime.device)
    return generators


def _restore_generators(generators: dict[str, Any], runtime: Runtime) -> None:
    version, state, gauss = generators["python"]
    random.setstate((version, tuple(state), gauss))
    torch.set_rng_state(generators["torch"])
    if runtime.device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], runtime.device)


def _decided_by_main(
    runtime: Runtime, decide: Callable[[], ResumePoint | None]
) -> ResumePoint | None:
    """Let rank 0 look at the disk; every rank returns its answer or raises its error."""
    answer: tuple[ResumePoint | None, Exception | None] = (None, None)
    if runtime.is_main:
        try:
            answer = (decide(), None)
        except Exception as error:  # or the other ranks would wait for ever
            answer = (None, error)
    point, error = broadcast_object(answer)
    if error is not None:
        raise error
    return point


def _differences(there: Any, here: Any, name: str = "model") -> list[str]:
    """Settings that differ, one "name: there, here" each."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        return [
            line
            for key in keys
            for line in _differences(there.get(key), here.get(key), f"{name}.{key}")
        ]
    return [] if there == here else [f"{name} is {there!r} there and {here!r} here"]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
