"""How often a call is timed, and what is read of a GPU; never how long anything took."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_runs_fill_the_seconds_between_few_and_many() -> None:
    assert timing.time_calls(lambda: None, CPU, 1.0).runs == timing.MOST_RUNS
    slow = timing.time_calls(lambda: time.sleep(0.01), CPU, 0.015)
    assert slow.runs == timing.FEWEST_RUNS
    assert slow.p20 <= slow.median <= slow.p80
    slower = timing.time_calls(lambda: time.sleep(0.02), CPU, 0.001)
    assert slower.runs == 1
    assert slower.p20 == slower.median == slower.p80


def test_a_cpu_has_neither_peak_nor_rate() -> None:
    assert timing.peak_extra_bytes(lambda: None, CPU) is None
    assert timing.matmul_tflops(CPU) is None


@pytest.mark.gpu
def test_peak_rate_and_replays_of_a_gpu() -> None:
    device = torch.device("cuda")
    size = 64 << 20

    def call() -> torch.Tensor:
        first = torch.ones(size, dtype=torch.int8, device=device)
        return first + first

    assert timing.peak_extra_bytes(call, device) == 2 * size
    rate = timing.matmul_tflops(device, 1024)
    assert rate is not None
    assert rate > 0
    assert timing.time_graph(call, device, 0.01).median > 0


@pytest.mark.gpu
def test_a_call_that_waits_for_the_gpu_is_no_graph() -> None:
    device = torch.device("cuda")
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError):
        timing.time_graph(lambda: x.sum().item(), device, 0.01)
    torch.cuda.synchronize()
