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
import itertools
import json
import logging
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file

from fastclip.distributed.collectives import barrier, broadcast_object
from fastclip.distributed.runtime import Runtime
from fastclip.engine import Engine, convert_to_universal
from fastclip.models.clip import Clip

logger = logging.getLogger("fastclip")

FORMAT_VERSION = 3
STEP_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint and how it has to be loaded."""

    directory: Path
    """The run's `checkpoints` directory."""

    tag: str
    step: int
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


def step_tag(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def complete_checkpoints(directory: Path) -> list[str]:
    """Names of the complete checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if STEP_NAME.fullmatch(p.name)]
    return sorted(n for n in names if (directory / n / "fastclip.json").is_file())


def save_checkpoint(
    directory: Path,
    engine: Engine,
    runtime: Runtime,
    *,
    step: int,
    loader_state: dict[str, Any],
    model_config: dict[str, Any],
    keep: int,
    algorithm: str = "adamw",
    frozen: Sequence[str] = (),
) -> Path:
    """Write the checkpoint of `step`, point `latest` at it, keep the newest `keep`. Collective."""
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
            "zero_stage": engine.zero_stage,
            "algorithm": algorithm,
            "frozen": list(frozen),
            "engine": engine.state_dict(),
            "loader": loader_state,
            "torch": torch.__version__,
        }
        _write_json(directory / partial / "fastclip.json", meta)
        _flush(directory / partial)
        _make_way(directory, tag)
        os.replace(directory / partial, final)
        _write_text(directory / "latest", tag + "\n")
        _prune(directory, keep)
    barrier()
    return final


def _flush(directory: Path) -> None:
    """Let a folder's files reach the disk: a name must not outlive a power cut without them."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _make_way(directory: Path, tag: str) -> None:
    """Take away what a new checkpoint `tag` must not be found beside.

    That is an earlier one of the same name, with its conversion, and, put aside, later ones: of a
    run that this one has begun anew in place of. Before the new one appears, so that a kill in
    between cannot leave them together.
    """
    for stale in (directory / f"{tag}-universal", directory / tag):
        shutil.rmtree(stale, ignore_errors=True)
    for later in complete_checkpoints(directory):
        if later > tag:
            aside = (directory / f".superseded-{later}-{n}" for n in itertools.count(1))
            kept = next(path for path in aside if not path.exists())
            os.replace(directory / later, kept)
            logger.warning(
                "%s is of a run that this one has begun anew in place of: it is kept as %s, and "
                "nothing reads it again",
                directory / later,
                kept.name,
            )


def _prune(directory: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints, and conversions of these alone."""
    complete = complete_checkpoints(directory)
    for old in complete[:-keep]:
        shutil.rmtree(directory / old)
    for conversion in directory.glob("step-*-universal"):
        if conversion.name.removesuffix("-universal") not in complete[-keep:]:
            shutil.rmtree(conversion)


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
        directory, chosen, meta["step"], meta["loader"], meta["engine"], same_world, load_tag
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
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, on disk when this returns."""
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
