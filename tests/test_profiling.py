"""`fastclip profile` leaves a trace, and a table in which each part of the step has its time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from fastclip.profiling import PARTS, format_table
from shards import write_shards


def test_a_trace_and_a_table(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, pairs=24)
    out = tmp_path / "profile"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fastclip", "profile", "smoke", "--data", str(shards)),
            *("--steps", "2", "--out", str(out), "run.device=cpu", "run.global_batch_size=8"),
            "run.micro_batches=2",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for part in (*PARTS, "step"):
        assert f"\n{part} " in done.stderr
    events = json.loads((out / "trace_rank0.json").read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("ph") == "X"]
    assert named.count("fastclip::update") == 2
    assert named.count("fastclip::image tower") == 6  # two micro-batches, one of them twice
    assert not (out / "checkpoints").exists()


def test_times_are_shared_out_over_the_steps() -> None:
    def entry(
        key: str, host: float, device: float, where: DeviceType = DeviceType.CPU
    ) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, cpu_time_total=host, device_time_total=device, device_type=where
        )

    entries = [
        entry("fastclip::loss", 4000.0, 8000.0),
        entry("fastclip::loss", 0.0, 8000.0, DeviceType.CUDA),
        entry("fastclip::backward", 12000.0, 20000.0),
        entry("nccl:all_reduce", 1000.0, 3000.0),
        entry("nccl:all_reduce", 0.0, 3000.0, DeviceType.CUDA),
        entry("ncclDevKernel_AllReduce_Sum_f32", 0.0, 3000.0, DeviceType.CUDA),
        entry("aten::mm", 9e9, 9e9),
    ]
    lines = format_table(entries, 2, on_cuda=True).splitlines()
    assert lines[1].split() == ["loss", "2.00", "25.0%", "4.00"]
    assert lines[2].split() == ["backward", "6.00", "75.0%", "10.00"]
    assert lines[3].split() == ["communication", "0.50", "6.2%", "1.50"]
    assert lines[4].split() == ["step", "8.00"]
    assert "GPU" not in format_table(entries, 2, on_cuda=False)


def test_no_steps_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    from fastclip import cli

    assert cli.main(["profile", "smoke", "--steps", "0"]) == 1
    assert "at least one step" in capsys.readouterr().err
