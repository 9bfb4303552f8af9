"""Settings of the engine, and the DeepSpeed configuration made from them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastclip.optim import OptimConfig

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# Top-level keys of DeepSpeed's JSON that a user may add. DeepSpeed ignores keys it does not know,
# so that a typing error would change nothing and say nothing.
PASS_THROUGH_KEYS = (
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "communication_data_type",
    "compile",
    "disable_allgather",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "sparse_gradients",
    "timers",
    "wall_clock_breakdown",
    "zero_optimization",
)
# Keys that fastclip sets itself, with the setting to use instead.
OWNED_KEYS = {
    "bf16": "engine.precision",
    "data_types": "engine.precision",
    "fp16": "engine.precision",
    "gradient_accumulation_steps": "run.micro_batches",
    "gradient_allreduce_op": "nothing: the loss fixes it",
    "gradient_clipping": "engine.gradient_clipping",
    "managed_gradient_accumulation": "run.micro_batches",
    "optimizer": "optim.*",
    "scheduler": "optim.schedule",
    "steps_per_print": "run.log_every_steps",
    "torch_autocast": "engine.precision",
    "train_batch_size": "run.global_batch_size",
    "train_micro_batch_size_per_gpu": "run.global_batch_size and run.micro_batches",
    "zero_allow_untested_optimizer": "optim.algorithm, whose choices are all tested",
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is distributed and in which precision it runs."""

    backend: Literal["auto", "plain", "deepspeed"] = "auto"
    """What runs a step: auto is plain PyTorch on one rank, and DeepSpeed on several."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """Sharded over the ranks: 0 nothing, 1 optimiser states, 2 gradients too, 3 parameters too."""

    precision: Precision = "bf16"
    """Autocast dtype of the towers. Parameters and optimiser states stay fp32, but for what
    compact_adamw keeps in bfloat16; the temperature always does."""

    gradient_clipping: float = 0.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""

    initial_loss_scale: float = 65536.0
    """fp16 only: the first loss scale. Halved at an overflow."""

    loss_scale_window: int = 1000
    """fp16 only: steps without an overflow after which the loss scale doubles."""

    outlier_factor: float = 0.0
    """Skip updates whose gradient norm is so many times the usual one; 0 for none. ZeRO 0 only."""

    max_skipped_steps: int = 50
    """Stop with an error after so many updates in a row were skipped; looked at on log steps."""

    deepspeed_json: str | None = None
    """Path of a JSON file with further DeepSpeed settings; keys fastclip owns are refused."""

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "plain", "deepspeed"):
            raise ValueError(f"engine.backend is auto, plain or deepspeed, not {self.backend!r}")
        if self.backend == "plain" and self.deepspeed_json is not None:
            raise ValueError("engine.deepspeed_json needs engine.backend=deepspeed")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage is 0, 1, 2 or 3, not {self.zero_stage!r}")
        if self.precision not in AUTOCAST_DTYPES:
            raise ValueError(
                f"engine.precision is one of {', '.join(AUTOCAST_DTYPES)}, not {self.precision!r}"
            )
        if not self.gradient_clipping >= 0:
            raise ValueError(
                f"engine.gradient_clipping is a norm, or 0 for none; got {self.gradient_clipping}"
            )
        if not self.initial_loss_scale >= 1 or self.loss_scale_window < 1:
            raise ValueError(
                "engine.initial_loss_scale and engine.loss_scale_window are at least 1"
            )
        if not (self.outlier_factor == 0 or self.outlier_factor > 1):
            raise ValueError(
                f"engine.outlier_factor is above 1, or 0 for none, not {self.outlier_factor}"
            )
        if self.max_skipped_steps < 1:
            raise ValueError("engine.max_skipped_steps is at least 1")


def choose_backend(
    config: EngineConfig, world_size: int, optim: OptimConfig
) -> Literal["plain", "deepspeed"]:
    """The engine that a run of `world_size` ranks gets.

    Raises:
        ValueError: the settings ask for what that engine cannot do.
    """
    algorithm = optim.algorithm
    if algorithm == "compact_adamw" and config.precision != "bf16":
        raise ValueError("optim.algorithm=compact_adamw needs engine.precision=bf16")
    if config.backend == "plain" and optim.needs_deepspeed:
        raise ValueError(f"optim.{algorithm=!s} by DeepSpeed needs engine.backend=deepspeed")
    if config.backend == "plain" and world_size > 1:
        raise ValueError(
            f"engine.backend=plain is for one rank, not {world_size}: leave it at auto"
        )
    alone = world_size == 1 and config.deepspeed_json is None and not optim.needs_deepspeed
    backend = config.backend
    if backend == "auto":
        backend = "plain" if alone else "deepspeed"
    if backend == "deepspeed" and config.outlier_factor and config.zero_stage:
        raise ValueError(
            "engine.outlier_factor needs engine.zero_stage=0: DeepSpeed's sharded optimisers know "
            "the norm only when they have stepped"
        )
    if backend == "deepspeed" and config.zero_stage and algorithm in ("lamb", "compact_adamw"):
        raise ValueError(
            f"optim.{algorithm=!s} works on whole parameters: under DeepSpeed it needs "
            "engine.zero_stage=0"
        )
    if algorithm == "muon" and config.gradient_clipping > 0:
        raise ValueError(
            "optim.algorithm=muon needs engine.gradient_clipping=0: DeepSpeed would clip Muon's "
            "orthogonal updates, of which the gradient's size says nothing"
        )
    if algorithm == "muon" and not config.zero_stage:
        raise ValueError(
            f"optim.{algorithm=!s} needs engine.zero_stage 1, 2 or 3: without sharding DeepSpeed "
            "would move parameters at a bad gradient too"
        )
    return backend


def effective_zero_stage(config: EngineConfig, world_size: int, optim: OptimConfig) -> int:
    """The stage at which states are kept: on the plain engine nothing is sharded."""
    return 0 if choose_backend(config, world_size, optim) == "plain" else config.zero_stage


def deepspeed_settings(
    config: EngineConfig,
    *,
    micro_batch_size: int,
    micro_batches: int,
    world_size: int,
    zero_keys: Collection[str],
    load_universal: bool = False,
) -> dict[str, Any]:
    """DeepSpeed's configuration with every value that matters written out.

    `zero_keys` are the names that the installed DeepSpeed knows inside ``zero_optimization``.

    Raises:
        ValueError: the user's JSON has a key that DeepSpeed does not know or that fastclip owns.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batch_size * micro_batches * world_size,
        # DeepSpeed's own default became 1.0 in 0.19.3; unset would clip silently. Without sharding
        # the clipping is the engine's.
        "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
        "steps_per_print": 10**12,
        # Its timer waits for the device at every forward and every step.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": config.zero_stage,
            # Stage 1 and 2 buffers: bytes are 4 per element, allocated on the device.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "overlap_comm": config.zero_stage >= 1,
            "contiguous_gradients": True,
            "round_robin_gradients": False,
        },
        "checkpoint": {"load_universal": load_universal, "tag_validation": "FAIL"},
        "zero_allow_untested_optimizer": False,
    }
    if config.deepspeed_json is not None:
        merge_user_settings(settings, Path(config.deepspeed_json), zero_keys)
    return settings


def merge_user_settings(settings: dict[str, Any], path: Path, zero_keys: Collection[str]) -> None:
    """Merge the user's JSON file into `settings`, refusing unknown keys and keys we own."""
    try:
        user = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"engine.deepspeed_json: no such file: {path}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"engine.deepspeed_json: {path} is not valid JSON: {error}") from None
    if not isinstance(user, dict):
        raise ValueError(f"engine.deepspeed_json: {path} must hold one JSON object")
    for key, value in user.items():
        if key in OWNED_KEYS:
            raise ValueError(f"{path}: set {OWNED_KEYS[key]} instead of DeepSpeed's {key!r}")
        _check_known(key, PASS_THROUGH_KEYS, f"{path}: DeepSpeed setting")
        if key != "zero_optimization":
            settings[key] = value
            continue
        for name in value:
            if name == "stage":
                raise ValueError(
                    f"{path}: set engine.zero_stage instead of zero_optimization.stage"
                )
            _check_known(name, zero_keys, f"{path}: zero_optimization setting")
        settings["zero_optimization"] = {**settings["zero_optimization"], **value}


def _check_known(name: str, known: Collection[str], what: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
    raise ValueError(f"{what} {name!r} is unknown{hint}")
