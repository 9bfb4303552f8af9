"""Run a function on several gloo ranks of one machine and collect what each returns."""

from __future__ import annotations

import os
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastclip.cli import leave
from fastclip.distributed.runtime import Runtime


def run_ranks(
    function: Callable[..., Any], world_size: int, directory: Path, *arguments: Any
) -> list[Any]:
    """Call ``function(runtime, *arguments)`` on every rank in its own process; results by rank.

    `function` is a module-level function. A failing rank's traceback becomes this call's error.
    """
    run = directory / f"ranks-{uuid.uuid4().hex}"
    run.mkdir()
    context = mp.get_context("spawn")
    workers = [
        context.Process(target=_worker, args=(function, rank, world_size, run, arguments))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failures = sorted(run.glob("error-*"))
    if failures:
        raise AssertionError("\n".join(f"{f.name}\n{f.read_text()}" for f in failures))
    codes = [worker.exitcode for worker in workers]
    assert codes == [0] * world_size, f"exit statuses {codes}"
    return [torch.load(run / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _worker(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    run: Path,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group(
        "gloo", init_method=f"file://{run / 'store'}", rank=rank, world_size=world_size
    )
    runtime = Runtime(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        backend="gloo",
    )
    try:
        result = function(runtime, *arguments)
    except BaseException:
        (run / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    torch.save(result, run / f"result-{rank}")
    dist.barrier()
    dist.destroy_process_group()
    os.environ["RANK"] = str(rank)
    leave(0)
