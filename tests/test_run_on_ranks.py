"""Ranks of one run: as many micro-batches on each, and other random numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from fastclip import run as run_module
from fastclip.config import apply_overrides
from fastclip.distributed.runtime import Runtime
from fastclip.recipes.smoke import smoke
from ranks import run_ranks
from shards import write_shards


def _started(runtime: Runtime, shards: Path) -> tuple[int, torch.Tensor]:
    """Micro-batches of a step, and what dropped patches would be drawn from."""
    # The later rank has less memory, and needs two parts.
    run_module.find_micro_batches = lambda *_, **__: 1 + runtime.rank
    settings = [
        f"run.directory={shards.parent / 'run'}",
        "run.micro_batches=auto",
        "run.global_batch_size=8",
        "run.steps=9",
        "run.tensorboard=false",
        "model.vision.layers=1",
        "model.text.layers=1",
    ]
    run = run_module.Run(apply_overrides(smoke(str(shards)), settings), runtime)
    run.close()
    assert run.train_step.ranks_alike  # or the host would wait in each step
    return run.train_step.micro_batches, torch.rand(8)


def test_ranks_split_alike_and_draw_apart(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, pairs=16)
    (parts, drawn), (other_parts, other_drawn) = run_ranks(_started, 2, tmp_path, shards)
    assert parts == other_parts == 2
    assert not torch.equal(drawn, other_drawn)
