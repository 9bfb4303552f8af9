"""Where a step's time goes: a few steps of a run under torch's profiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastclip.config import TrainConfig
from fastclip.distributed.runtime import initialise, shutdown
from fastclip.run import Run
from fastclip.run_folder import check_fresh

WARM_UP_STEPS = 3
PARTS = (
    "data wait", "copy to device", "image tower", "text tower", "loss", "backward", "update",
)  # fmt: skip
"""Ranges that the step marks, in its order; `fastclip::` stands before each in the trace."""

_PREFIX = "fastclip::"
_KERNELS = "ncclDevKernel"
_COMMUNICATION = ("nccl:", "gloo:")


def profile_run(config: TrainConfig, directory: Path, steps: int = 5) -> str:
    """Train a few steps, leave a chrome trace of each rank in `directory`, and give a table.

    Nothing is resumed, saved or evaluated. Every rank calls this.

    Raises:
        ValueError: `steps` is not positive; or as `train`.
    """
    if steps < 1:
        raise ValueError(f"at least one step is profiled, not {steps}")
    quiet = dataclasses.replace(
        config.run, directory=str(directory), resume=False, tensorboard=False, wandb_project=None
    )
    runtime = initialise(config.run.device)
    try:
        check_fresh(directory, "the profile", runtime)
        run = Run(dataclasses.replace(config, run=quiet), runtime)
        run.begin()
        for _ in range(WARM_UP_STEPS):
            run.one_step()
        activities = [ProfilerActivity.CPU]
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
            activities.append(ProfilerActivity.CUDA)
        # On a thread of its own, autograd's kernels would be outside of the part "backward".
        with (
            torch.autograd.set_multithreading_enabled(False),
            profile(activities=activities, acc_events=True) as profiler,
        ):
            for _ in range(steps):
                run.one_step()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize(runtime.device)
        trace = directory / f"trace_rank{runtime.rank}.json"
        profiler.export_chrome_trace(str(trace))
        run.close()
    finally:
        shutdown()
    table = format_table(profiler.key_averages(), steps, on_cuda=runtime.device.type == "cuda")
    return f"{table}\n\ntrace: {trace} (chrome://tracing, or ui.perfetto.dev)"


def format_table(averages: Iterable[Any], steps: int, *, on_cuda: bool) -> str:
    """Milliseconds a step of each part, on the host and on the device, and of communication.

    A part's time on a GPU is that of the kernels that its calls have started; the host's is how
    long the calls took.
    """
    host: dict[str, float] = {}
    device: dict[str, float] = {}
    for entry in averages:
        name, on_device = entry.key, entry.device_type.name == "CUDA"
        if name.startswith(_KERNELS):
            part, on_device = "communication", True
        elif on_device:
            continue  # a range once more, with the same kernels' time
        elif name.startswith(_PREFIX):
            part = name.removeprefix(_PREFIX)
        elif name.startswith(_COMMUNICATION):
            part = "communication"
        else:
            continue
        if not on_device:
            host[part] = host.get(part, 0.0) + entry.cpu_time_total / 1e3 / steps
        if on_device or part != "communication":
            device[part] = device.get(part, 0.0) + entry.device_time_total / 1e3 / steps
    parts = [part for part in PARTS if part in host]
    whole = sum(host[part] for part in parts)
    lines = [f"{'part':<16} {'host ms':>10} {'share':>7}" + (f" {'GPU ms':>10}" if on_cuda else "")]
    for part in [*parts, *(["communication"] if "communication" in host else [])]:
        share = f"{host[part] / whole:.1%}" if whole else "–"
        gpu = f" {device.get(part, 0.0):>10.2f}" if on_cuda else ""
        lines.append(f"{part:<16} {host[part]:>10.2f} {share:>7}{gpu}")
    lines.append(f"{'step':<16} {whole:>10.2f}")
    if "communication" in host:
        lines.append("(communication is part of loss, backward and update)")
    return "\n".join(lines)
