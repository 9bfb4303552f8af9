"""A run that diverges goes back to its newest checkpoint, and on with other data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards import write_shards

# Gradients of some calls are not finite, counted over all engines of the process.
SCRIPT = """
import math, sys
from fastclip import cli
from fastclip.data.loader import TrainLoader
from fastclip.engine import Engine
bad = set(map(int, sys.argv[1].split(",")))
calls = 0
backward = Engine.backward
def poisoned(self, loss):
    global calls
    calls += 1
    backward(self, loss * math.nan if calls in bad else loss)
Engine.backward = poisoned
following = TrainLoader.__next__
def noted(self):
    batch = following(self)
    print("batch", self._position, flush=True)
    return batch
TrainLoader.__next__ = noted
sys.exit(cli.main(sys.argv[2:]))
"""


def _run(folder: Path, bad: list[int], *overrides: str) -> subprocess.CompletedProcess[str]:
    shards = write_shards(folder, pairs=40)
    settings = [
        "model.vision.layers=1", "model.text.layers=1", "optim.warmup_steps=2", "run.steps=12",
        "run.global_batch_size=8", "run.log_every_steps=1", "run.checkpoint_every_steps=2",
        "run.device=cpu", "run.tensorboard=false", "engine.max_skipped_steps=3",
        f"run.directory={folder / 'run'}", *overrides,
    ]  # fmt: skip
    return subprocess.run(
        [
            *(sys.executable, "-c", SCRIPT, ",".join(map(str, bad))),
            *("train", "smoke", "--data", str(shards), *settings),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_it_goes_back_and_finishes(tmp_path: Path, stage: int) -> None:
    # Steps 7, 8 and 9: the checkpoint due at step 8 is not written, that of step 6 is the newest.
    done = _run(tmp_path, [7, 8, 9], f"engine.zero_stage={stage}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 updates in a row" in done.stderr
    assert "at step 6" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["update_applied"] == 1.0 for row in rows)
    # Nine batches, then six more that had not been seen.
    positions = [int(line.split()[1]) for line in done.stdout.splitlines() if "batch" in line]
    assert positions == [8 * number for number in range(1, 16)]


def test_two_bad_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    done = _run(tmp_path, [7, 8])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["update_applied"] == 0.0] == [7, 8]
    assert rows[-1]["skipped_steps"] == 2


@pytest.mark.parametrize(
    ("bad", "overrides"),
    [
        ([1, 2, 3], []),  # no checkpoint yet
        ([7, 8, 9], ["run.max_rollbacks=0"]),
        ([7, 8, 9, 10, 11, 12], ["run.max_rollbacks=1"]),
    ],
)
def test_it_gives_up(tmp_path: Path, bad: list[int], overrides: list[str]) -> None:
    done = _run(tmp_path, bad, *overrides)
    assert done.returncode == 1
    assert "fastclip: error: 3 updates in a row were skipped" in done.stderr
