"""Windows of throughput, and where the numbers go."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from pathlib import Path

import pytest
import torch

from fastclip import metrics
from fastclip.metrics import RunLogger, Throughput, cut_back, duration, peak_memory

CPU = torch.device("cpu")


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


def test_a_window_counts_its_own_steps_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    throughput = Throughput(device=CPU, precision="fp32", global_batch_size=10, world_size=2)
    throughput.peak = 1000.0
    throughput.start(1.0)
    for _ in range(4):
        throughput.step(flops_per_sample=5.0)
        clock.now += 0.5
    with throughput.paused():
        clock.now += 100.0
    figures = throughput.window(1.5)
    assert figures["samples_per_second"] == pytest.approx(20.0)
    assert figures["step_seconds"] == pytest.approx(0.5)
    assert figures["data_wait"] == pytest.approx(0.25)
    assert figures["mfu"] == pytest.approx(4 * 10 * 5.0 / 2.0 / 1000.0)
    throughput.step(5.0)
    clock.now += 1.0
    assert throughput.window(1.5)["samples_per_second"] == pytest.approx(10.0)


def test_mfu_of_an_unknown_device_is_not_a_number() -> None:
    throughput = Throughput(device=CPU, precision="bf16", global_batch_size=1, world_size=1)
    throughput.step(1.0)
    assert throughput.window(0.0)["mfu"] is None
    assert peak_memory(CPU) > 2**20


def _logger(directory: Path, **options) -> RunLogger:
    settings = {"is_main": True, "total_steps": 10, "tensorboard": False, **options}
    return RunLogger(directory, **settings)


def _lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_lines_carry_every_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fastclip")
    log = _logger(tmp_path)
    loss = torch.tensor(0.1)
    log.step(1, {"loss": loss, "gradient_norm": float("inf"), "mfu": None, "update_applied": 0.0})
    log.evaluation(1, {"zero_shot/a/top1": 0.5})
    log.end({"broken image": 2})
    first, second = _lines(tmp_path)
    assert first == {
        "step": 1,
        "loss": float(loss),
        "gradient_norm": "inf",
        "mfu": None,
        "update_applied": 0.0,
    }
    assert second == {"step": 1, "eval/zero_shot/a/top1": 0.5}
    assert "MFU n/a" in caplog.text
    assert "UPDATE SKIPPED (gradient not finite)" in caplog.text
    assert "samples left out: 2 broken image" in caplog.text


def test_a_resumed_run_cuts_what_it_will_do_again(tmp_path: Path) -> None:
    log = _logger(tmp_path)
    for step in range(1, 6):
        log.step(step, {"loss": step})
    log.end({})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a crash
    again = _logger(tmp_path, resume_at=3)
    again.step(4, {"loss": 40})
    again.end({})
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]
    cut_back(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_launches_are_recorded(tmp_path: Path) -> None:
    for step in (0, 3):
        log = _logger(tmp_path, resume_at=step)
        log.start(f"from step {step}")
        log.end({})
    launches = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    assert [launch["step"] for launch in launches] == [0, 3]
    assert launches[1]["description"] == "from step 3"
    assert launches[0]["versions"]["torch"] == torch.__version__
    assert launches[0]["begin"] <= launches[1]["begin"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = _logger(tmp_path / "run", is_main=False)
    log.start("x")
    log.step(1, {"loss": 1.0})
    log.evaluation(1, {"a": 1.0})
    log.end({"x": 1})
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = _logger(tmp_path, tensorboard=True)
    log.step(1, {"loss": 2.5, "mfu": None})
    log.evaluation(1, {"zero_shot/a/top1": 0.25})
    log.end({})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "eval/zero_shot/a/top1"]
    assert events.Scalars("train/loss")[0].value == 2.5


def test_missing_wandb_says_what_to_do(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(ImportError, match="pip install wandb"):
        _logger(tmp_path, wandb_project="p")


def test_durations() -> None:
    assert duration(3 * 3600 + 62) == "3:01:02"
    assert math.isfinite(float(duration(59.7).split(":")[1]))
