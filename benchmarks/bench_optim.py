"""One optimiser step of a model's parameters: ``python -m benchmarks.bench_optim``.

Ours in eight bytes a parameter (compact) and LAMB, beside torch's AdamW in fp32 and in bfloat16
rounded to nearest, torchao's in bfloat16 with stochastic rounding, and apex's where it is built.
The first step is compared with AdamW's in fp64, and a wrong one gets no times.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import record, timing
from benchmarks.harness import RESUME, alive, finish, one_line
from fastclip import nvidia_apex
from fastclip.models.clip import Clip
from fastclip.models.presets import PRESETS, preset
from fastclip.optim import CompactAdamW, Lamb

COLUMNS = (
    *record.STAMP_COLUMNS, "provider", "version", "model", "parameters", "median_ms", "p20_ms",
    "p80_ms", "runs", "bytes_per_parameter", "peak_bytes", "step_error", "error",
)  # fmt: skip
KEY = ("commit", "dirty", "device", "provider", "model")
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


@dataclass(frozen=True)
class Provider:
    """One optimiser."""

    name: str
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    stored: torch.dtype = torch.float32
    """Of the matrices; vectors are fp32."""

    distribution: str = "fastclip-torch"
    adamw: bool = True
    """Whether its step is AdamW's, and compared."""


def _torchao(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import _AdamW  # pyright: ignore[reportMissingImports]

    return _AdamW(parameters, bf16_stochastic_round=True, **SETTINGS)


def _groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters}]


def providers() -> list[Provider]:
    """Those that are installed."""
    low = torch.bfloat16
    found = [
        Provider("fastclip-compact", lambda p: CompactAdamW(_groups(p), **SETTINGS), low),
        Provider("fastclip-lamb", lambda p: Lamb(_groups(p), **SETTINGS), adamw=False),
        Provider(
            "torch-fused",
            lambda p: torch.optim.AdamW(p, fused=True, **SETTINGS),
            distribution="torch",
        ),
        Provider(
            "torch-fused-bf16",
            lambda p: torch.optim.AdamW(p, fused=True, **SETTINGS),
            low,
            distribution="torch",
        ),
    ]
    if importlib.util.find_spec("torchao") is not None:
        found.append(Provider("torchao-bf16", _torchao, low, "torchao"))
    fused_adam = nvidia_apex.find_optimizer("FusedAdam")
    if fused_adam is not None:
        found.append(Provider("apex", lambda p: fused_adam(p, **SETTINGS), distribution="apex"))
    return found


class Drawn(NamedTuple):
    """A parameter's numbers, in bfloat16, so that every dtype holds the same."""

    value: torch.Tensor
    gradient: torch.Tensor


def draw(model: str, device: torch.device) -> list[Drawn]:
    """Of a preset, on the device: a core takes 18 seconds for those of ViT-L/14."""
    torch.manual_seed(0)
    with device:
        made = Clip(preset(model))
    return [
        Drawn(
            parameter.detach().bfloat16().contiguous(),
            (torch.randn_like(parameter) * 1e-3).bfloat16().contiguous(),
        )
        for parameter in made.parameters()
    ]


def parameters_of(drawn: list[Drawn], stored: torch.dtype) -> list[torch.nn.Parameter]:
    """Copies with gradients."""
    made = []
    for value, gradient in drawn:
        dtype = stored if value.ndim > 1 else torch.float32
        made.append(torch.nn.Parameter(value.to(dtype, copy=True)))
        made[-1].grad = gradient.to(dtype, copy=True)
    return made


def step_error(before: list[torch.Tensor], after: list[torch.nn.Parameter]) -> float:
    """Of a first step's change, relative to AdamW's in fp64, in its norm over all parameters."""
    wrong = right = 0.0
    for old, new in zip(before, after, strict=True):
        assert new.grad is not None
        gradient, old = new.grad.double(), old.double()
        change = -SETTINGS["lr"] * (
            SETTINGS["weight_decay"] * old + gradient / (gradient.abs() + SETTINGS["eps"])
        )
        found = new.detach().double() - old
        if new.dtype == torch.bfloat16:
            # One rounding is coarser than the step: what counts is its mean.
            change, found = change.mean(), found.mean()
        wrong += float((found - change).norm()) ** 2
        right += float(change.norm()) ** 2
    return (wrong / right) ** 0.5


def measure(
    provider: Provider, drawn: list[Drawn], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Cells of a row; an exception's first line as `error`."""
    try:
        cells = _measured(provider, drawn, device, seconds)
    except Exception as error:
        cells = {"error": one_line(error)}
    gc.collect()
    return cells


def _measured(
    provider: Provider, drawn: list[Drawn], device: torch.device, seconds: float
) -> dict[str, Any]:
    parameters = parameters_of(drawn, provider.stored)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = provider.make(parameters)
    optimizer.step()
    error = step_error(before, parameters) if provider.adamw else None
    # Whole weights are off by fp32's last bit of a weight that is much larger than the step.
    limit = 1e-2 if provider.stored == torch.float32 else 0.1
    if error is not None and error > limit:
        return {"step_error": error, "error": f"the step is off by {error:.2g}"}
    del before
    count = sum(parameter.numel() for parameter in parameters)
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    times, peak = timing.times_and_peak(optimizer.step, device, seconds)
    return {
        "parameters": count,
        "bytes_per_parameter": sum(t.numel() * t.element_size() for t in tensors) / count,
        "peak_bytes": peak,
        "step_error": error,
        **dict(zip(("median_ms", "p20_ms", "p80_ms", "runs"), times, strict=True)),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 if a step failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=["ViT-B-32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--dirty", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    stamp = record.stamp(options.commit, options.dirty, device)
    rows = record.Record(options.out / "optim.csv", COLUMNS, KEY)
    failed = False
    for model in options.models:
        drawn: list[Drawn] = []
        for provider in providers():
            key = {**stamp.columns(), "provider": provider.name, "model": model}
            if rows.has(key):
                continue
            drawn = drawn or draw(model, device)
            cells = measure(provider, drawn, device, options.seconds)
            version = record.version_of(provider.distribution)
            rows.write({**key, "version": version, **cells})
            failed |= "error" in cells
            if "error" in cells:
                print(f"{model} {provider.name}: {cells['error']}", flush=True)
                if not alive(device):
                    return RESUME
                continue
            print(
                f"{model} {provider.name}: {cells['median_ms']:.2f} ms, "
                f"{cells['bytes_per_parameter']:.2f} bytes a parameter",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    finish(main())
