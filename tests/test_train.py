"""Whole runs from the command line: learning, kill -9 and resume to the bit, another world size."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards import sample, write_shards, write_tar

STEPS = 12
BASE = [
    "model.vision.layers=1",
    "model.text.layers=1",
    "optim.warmup_steps=2",
    f"run.steps={STEPS}",
    "run.global_batch_size=24",
    "run.log_every_steps=1",
    "run.checkpoint_every_steps=3",
    "run.device=cpu",
    "run.tensorboard=false",
    "data.positives=label",
]


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _command(shards: Path, run: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launch = [sys.executable, "-m", "fastclip"]
    if ranks > 1:
        launch = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), "-m", "fastclip"),
        ]
    settings = [*BASE, f"run.directory={run}", *overrides]
    return [*launch, "train", "smoke", "--data", str(shards), *settings]


def _run(shards: Path, run: Path, *overrides: str, ranks: int = 1, status: int = 0) -> str:
    done = subprocess.run(
        _command(shards, run, *overrides, ranks=ranks),
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr[-4000:]
    return done.stderr


def _losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _kill_after(shards: Path, run: Path, step: int, *overrides: str) -> None:
    process = subprocess.Popen(
        _command(shards, run, *overrides),
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"loss"') >= step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    _run(shards, run)
    return run


def test_the_run_learns_and_leaves_its_files(uninterrupted):
    losses = _losses(uninterrupted)
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.1
    checkpoints = uninterrupted / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == f"step-{STEPS:08d}"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == [
        f"step-{STEPS - 3:08d}",
        f"step-{STEPS:08d}",
    ]
    assert json.loads((uninterrupted / "config.json").read_text())["run"]["steps"] == STEPS


def test_killed_at_random_steps_the_losses_are_bit_identical(shards, uninterrupted, tmp_path):
    run = tmp_path / "killed"
    seed = random.randrange(10**6)
    print(f"kill steps drawn with seed {seed}")
    draw = random.Random(seed)
    for low, high in ((1, 4), (5, 8), (9, 11)):
        _kill_after(shards, run, draw.randint(low, high))
    _run(shards, run)
    assert _losses(run) == _losses(uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_lose_no_sample_and_no_bit(shards, tmp_path):
    settings = ["run.steps=40", "run.checkpoint_every_steps=2", "data.crop_scale=0.5,1"]
    whole, run = tmp_path / "whole", tmp_path / "killed"
    _run(shards, whole, *settings)
    seed = random.randrange(10**6)
    print(f"kill steps drawn with seed {seed}")
    draw = random.Random(seed)
    for number in range(10):
        _kill_after(shards, run, 3 * number + draw.randint(2, 5), *settings)
    last = _run(shards, run, *settings)
    assert _losses(run) == _losses(whole)
    epochs = [line for line in last.splitlines() if "samples planned" in line]
    assert epochs
    assert all(line.endswith("delivered + 0 replaced") for line in epochs)


def test_sigterm_saves_and_the_next_launch_continues(shards, uninterrupted, tmp_path):
    run = tmp_path / "stopped"
    process = subprocess.Popen(
        _command(shards, run, "run.checkpoint_every_steps=none"),
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 2):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "continues from here" in errors
    _run(shards, run, "run.checkpoint_every_steps=none")
    assert _losses(run) == _losses(uninterrupted)


def test_a_stop_at_the_last_step_does_not_cost_the_evaluation(shards, tmp_path):
    script = """
import os, signal, sys
from fastclip import cli
from fastclip.run import Run
step = Run.one_step
def signalled(self):
    done = step(self)
    if self.step == self.total_steps:
        os.kill(os.getpid(), signal.SIGTERM)
    return done
Run.one_step = signalled
sys.exit(cli.main(sys.argv[1:]))
"""
    run = tmp_path / "run"
    pairs = json.dumps([{"name": "pairs", "shards": str(shards)}])
    command = _command(shards, run, "run.steps=3", f"eval.retrieval={pairs}")[3:]
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SIGTERM" in done.stderr
    assert '"eval/retrieval/pairs/' in (run / "metrics.jsonl").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.global_batch_size=25", "run.micro_batches=2"], "not divisible"),
        (["model=RN-Nano", "run.micro_batches=2"], "BatchNorm"),
        (["optim.learning_rat=1"], "learning_rate"),
        (["run.init_from=/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(shards, tmp_path, overrides, message):
    errors = _run(shards, tmp_path / "run", *overrides, status=1)
    assert message in errors
    assert "Traceback" not in errors


def test_shards_that_do_not_exist_are_an_error(tmp_path):
    errors = _run(tmp_path / "nothing-*.tar", tmp_path / "run", status=1)
    assert "nothing-*.tar" in errors


def test_damaged_data_is_counted_named_and_survived(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    rows = [sample(i) for i in range(100)]
    for index in (3, 23, 43, 63, 83):  # 5 % broken pictures
        rows[index][1]["png"] = b"<html>not a picture</html>"
    del rows[50][1]["txt"]
    write_tar(directory / "0.tar", rows[:60])
    whole = write_tar(directory / "1.tar", rows[60:]).read_bytes()
    (directory / "1.tar").write_bytes(whole[: len(whole) // 2])
    run = tmp_path / "run"
    errors = _run(directory, run, "run.steps=10")
    assert len(_losses(run)) == 10
    for named in ("000003", "000050", "1.tar"):
        assert named in errors, errors


@pytest.mark.parametrize(
    "stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3]
)
def test_resume_on_another_number_of_ranks(shards, tmp_path, stage):
    zero = f"engine.zero_stage={stage}"
    moved = tmp_path / "moved"
    _run(shards, moved, zero, "run.steps=6", "optim.schedule=constant", ranks=2)
    _run(shards, moved, zero, "optim.schedule=constant", ranks=1)
    reference = tmp_path / "reference"
    _run(shards, reference, zero, "optim.schedule=constant", ranks=2)
    expected = _losses(reference)
    assert _losses(moved) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == STEPS
