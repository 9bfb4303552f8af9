"""How long a call takes and how much memory it needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[], object]

FLUSH_BYTES = 256 << 20
"""Written between runs; no L2 cache is larger, so that none still holds the operands."""

MOST_RUNS = 200
FEWEST_RUNS = 3


class Timing(NamedTuple):
    """Quantiles in milliseconds over `runs` calls."""

    median: float
    p20: float
    p80: float
    runs: int


def time_calls(call: Call, device: torch.device, seconds: float) -> Timing:
    """Times of `call` for about `seconds`, after one warm-up call and one that is an estimate.

    Three calls at least, or the estimate alone where that took longer than all of `seconds`.
    """
    once = _timed_on_gpu if device.type == "cuda" else _timed_on_cpu
    call()
    (estimate,) = once(call, 1, device)
    if estimate > 1e3 * seconds:
        return _quantiles([estimate])
    runs = int(min(MOST_RUNS, max(FEWEST_RUNS, 1e3 * seconds / max(estimate, 1e-3))))
    return _quantiles(once(call, runs, device))


def time_graph(call: Call, device: torch.device, seconds: float) -> Timing:
    """Times of replays of `call`, captured as a CUDA graph: without the launches' cost on the CPU.

    Raises:
        RuntimeError: the call cannot be captured; it synchronises, or allocates outside of torch.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # torch asks for a warm-up on another stream
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            kept = call()
    finally:
        # A capture that fails can leave its own stream as the current one.
        torch.cuda.set_stream(before)
    timing = time_calls(graph.replay, device, seconds)
    del kept
    return timing


def times_and_peak(call: Call, device: torch.device, seconds: float) -> tuple[Timing, int | None]:
    """As `time_calls`, and most bytes allocated at a time, results included; None off CUDA.

    The call whose memory is measured is the only one where it took longer than all of `seconds`.
    """
    if device.type != "cuda":
        return time_calls(call, device, seconds), None
    peak, milliseconds = _peak(call, device)
    if milliseconds > 1e3 * seconds:
        return _quantiles([milliseconds]), peak
    return time_calls(call, device, seconds), peak


def matmul_tflops(device: torch.device, size: int = 8192) -> float | None:
    """Rate of a square bf16 matmul in TFLOP/s, the ceiling that shares are given of; CUDA only."""
    if device.type != "cuda":
        return None
    # Random data: on zeros the chip draws less power and clocks higher.
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / time_calls(lambda: a @ b, device, 0.5).median / 1e9


def _peak(call: Call, device: torch.device) -> tuple[int, float]:
    """Most bytes beyond those before it, and milliseconds, of one call on CUDA."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before, start.elapsed_time(end)


def _timed_on_gpu(call: Call, runs: int, device: torch.device) -> list[float]:
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(runs)
    ]
    torch.cuda.synchronize(device)
    for start, end in events:
        flushed.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _timed_on_cpu(call: Call, runs: int, device: torch.device) -> list[float]:
    del device
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _quantiles(times: list[float]) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], len(times))
