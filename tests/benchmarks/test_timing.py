"""How often a call is timed, and what is read of a GPU; never how long anything took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

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
    assert timing.times_and_peak(lambda: None, CPU, 0.001)[1] is None
    assert timing.matmul_tflops(CPU) is None


def test_the_call_for_the_peak_is_the_only_one_of_a_slow_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def timed(call: timing.Call, runs: int, device: torch.device) -> list[float]:
        return [5.0 for _ in range(runs) if call() is None]

    def peak(milliseconds: float) -> None:
        def measured(call: timing.Call, device: torch.device) -> tuple[int, float]:
            call()
            return 7, milliseconds

        monkeypatch.setattr(timing, "_peak", measured)

    monkeypatch.setattr(timing, "_timed_on_gpu", timed)
    cuda = torch.device("cuda")
    peak(1001.0)
    slow = timing.times_and_peak(lambda: calls.append("slow"), cuda, 1.0)
    assert slow == (timing.Timing(1001.0, 1001.0, 1001.0, 1), 7)
    assert calls == ["slow"]
    peak(999.0)
    fast = timing.times_and_peak(lambda: calls.append("fast"), cuda, 1.0)
    assert fast == (timing.Timing(5.0, 5.0, 5.0, 200), 7)


def test_a_failed_capture_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, device: object = None) -> None:
            pass

        def wait_stream(self, other: Stream) -> None:
            pass

    current = [before := Stream()]

    @contextlib.contextmanager
    def stream(other: Stream) -> Iterator[None]:
        current.append(other)
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(captured: object) -> Iterator[None]:
        current.append(Stream())
        yield
        raise RuntimeError("the capture was invalidated")  # before the stream is restored

    for name, value in {
        "Stream": Stream,
        "stream": stream,
        "graph": graph,
        "CUDAGraph": lambda: None,
        "current_stream": lambda device: current[-1],
        "set_stream": current.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match="invalidated"):
        timing.time_graph(lambda: None, torch.device("cuda"), 1.0)
    assert current[-1] is before


@pytest.mark.gpu
def test_peak_rate_and_replays_of_a_gpu() -> None:
    device = torch.device("cuda")
    size = 64 << 20

    def call() -> torch.Tensor:
        first = torch.ones(size, dtype=torch.int8, device=device)
        return first + first

    times, peak = timing.times_and_peak(call, device, 1.0)
    assert peak == 2 * size
    assert times.runs > 1
    assert timing.times_and_peak(call, device, 1e-9)[0].runs == 1
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
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
