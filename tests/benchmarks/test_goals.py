"""Goals: each finds its figure in rows that a program would write, and says what it is worth."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict

import pytest

from benchmarks import bench_contrastive, bench_sigmoid, bench_step, goal_measures, goals
from benchmarks.cases import Case
from benchmarks.goal_measures import (
    Figure,
    Measure,
    beside_open_clips_training,
    guard_cost,
    over_compiled_open_clip,
    over_exact_peers,
    quotient,
    utilisation,
    value,
)
from benchmarks.goals import Goal
from benchmarks.record import RESULTS, read_rows
from benchmarks.steps import StepCase

STAMP = {
    "commit": "new", "dirty": "False", "date": "2030-01-02", "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0", "triton": "3.6.0", "error": "",
}  # fmt: skip
STEP = StepCase("ViT-B-32", 1024)


class Rows:
    """Rows by their benchmark's name."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, str]]] = defaultdict(list)

    def __call__(self, name: str) -> list[dict[str, str]]:
        return self.rows[name]

    def add(self, benchmark: str, **cells: object) -> None:
        text = {name: "" if cell is None else str(cell) for name, cell in cells.items()}
        self.rows[benchmark].append({**STAMP, **text})

    def values(self, measure: Measure) -> list[float | None]:
        return [figure.value for figure in measure(self)]


def test_the_newest_row_of_each_device_counts() -> None:
    rows = Rows()
    rows.add("optim", provider="ours", median_ms=3.0, date="2031")
    rows.add("optim", provider="ours", median_ms=4.0)
    rows.add("optim", provider="ours", median_ms=5.0, device="cpu")
    rows.add("optim", provider="other", median_ms=6.0, date="2032")
    assert sorted(rows.values(value("optim", "median_ms", 1e-3, provider="ours"))) == [3e-3, 5e-3]  # pyright: ignore[reportArgumentType]


def test_ratios_are_of_one_device_and_commit() -> None:
    rows = Rows()
    measure = quotient("loader", "per_second", {"cores": 2}, {"cores": 1}, provider="fastclip")
    rows.add("loader", provider="fastclip", cores=1, per_second=10)
    rows.add("loader", provider="fastclip", cores=2, per_second=99, commit="old")
    assert rows.values(measure) == []
    rows.add("loader", provider="fastclip", cores=2, per_second=19)
    assert rows.values(measure) == [1.9]


def test_only_exact_peers_count_and_the_fastest_of_them() -> None:
    rows, case = Rows(), Case(65_536, 768)

    def add(provider: str, ms: float | None, error: float | None, **cells: object) -> None:
        rows.add("contrastive", provider=provider, median_ms=ms, gradient_error=error,
                 **asdict(case), **cells)  # fmt: skip

    add("fastclip", 40.0, 1e-3)
    add("fastclip-stored", 1.0, 1e-3)
    add("reference", 2.0, 1e-3)
    add("memeff", 50.0, 5e-2)  # fast and wrong, though not in another case
    easy = {**asdict(case), "pairs": 2048, "dtype": "fp32"}
    rows.add("contrastive", provider="memeff", median_ms=0.1, gradient_error=1e-6, **easy)
    assert rows.values(over_exact_peers(case)) == []
    add("inf-cl", 160.0, 1e-3)
    add("cut-cross-entropy", 80.0, 1e-3)
    assert rows.values(over_exact_peers(case)) == [2.0]


def test_steps_take_the_better_of_our_ways_and_a_failed_peer_is_no_ratio() -> None:
    rows = Rows()
    for provider, ms in (("fastclip", 120.0), ("fastclip-compiled", 100.0)):
        rows.add("step", provider=provider, median_ms=ms, tflops=6e4 / ms, **asdict(STEP))
    rows.add(
        "step", provider="open_clip-compiled", median_ms="", **{**asdict(STEP), "error": "OOM"}
    )
    assert rows.values(over_compiled_open_clip(STEP)) == [None]
    rows.rows["step"].pop()
    rows.add("step", provider="open_clip-compiled", median_ms=190.0, **asdict(STEP))
    assert rows.values(over_compiled_open_clip(STEP)) == [1.9]
    # 600 TFLOP/s in the padded towers' arithmetic, of which 64.5 % is executed; the sheet has 989.
    assert rows.values(utilisation(STEP)) == [pytest.approx(39.1, abs=0.2)]


def test_the_guards_cost_is_relative_to_the_step_without_it() -> None:
    rows = Rows()
    rows.add("step", provider="fastclip", median_ms=100.4, **asdict(STEP))
    rows.add("step", provider="fastclip-unguarded", median_ms=100.0, **asdict(STEP))
    assert rows.values(guard_cost(STEP)) == [pytest.approx(0.4)]


def test_trainings_are_compared_by_their_means_over_seeds() -> None:
    rows = Rows()
    case = {"pairs": 10, "model": "M", "precision": "bf16", "batch": 4, "epochs": 2}
    for provider, accuracies in (("fastclip", (0.4, 0.6)), ("open_clip", (0.45, 0.5))):
        for seed, accuracy in enumerate(accuracies):
            rows.add("training", provider=provider, seed=seed, mean_accuracy=accuracy, **case)
    rows.add("training", provider="open_clip", seed=3, mean_accuracy="", error="killed", **case)
    other = {**case, "batch": 8, "seed": 0}
    rows.add("training", provider="fastclip", mean_accuracy=0.1, date="2031", **other)
    gain = beside_open_clips_training("mean_accuracy", "M", 4, relative=False)
    assert rows.values(gain) == [pytest.approx(2.5)]


@pytest.mark.parametrize(
    ("measured", "state"),
    [(None, "failed"), (45.1, "**missed**"), (45.0, "met"), (40.1, "met"), (40.0, "goal met")],
)
def test_what_a_figure_is_worth(
    measured: float | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = [Figure(measured, STAMP), Figure(1.0, {**STAMP, "device": "cpu (x86_64)"})]
    goal = Goal("Softmax loss", "≤", 45, "ms", lambda rows: figures, 40)
    monkeypatch.setattr(goals, "GOALS", (goal,))
    shown = "–" if measured is None else f"{measured:.3g} ms"
    text = goals.table(Rows())
    head = "| Softmax loss | ≤ 45 ms | ≤ 40 ms |"
    assert f"{head} {shown} (NVIDIA H100 80GB HBM3) | {state} |" in text
    assert text.count(head) == 1
    assert "Measured on NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0, commit new" in text


def test_every_goal_of_a_cpu_finds_its_row() -> None:
    def rows(name: str) -> list[dict[str, str]]:
        return read_rows(RESULTS / f"{name}.csv")

    assert [goal.what for goal in goals.GOALS if not goal.gpu and not goal.measure(rows)] == []


def test_every_goal_of_a_gpu_asks_for_a_case_that_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise it would stay unmeasured for ever."""
    asked: list[tuple[str, dict[str, object]]] = []
    read: list[str] = []

    def rows(name: str) -> list[dict[str, str]]:
        read.append(name)
        return []

    def note(rows: object, cells: dict[str, object]) -> list[dict[str, str]]:
        asked.append((read[-1], {k: v for k, v in cells.items() if k != "provider"}))
        return []

    monkeypatch.setattr(goal_measures, "newest", note)
    for goal in goals.GOALS:
        if goal.gpu:
            goal.measure(rows)
    for benchmark in (bench_contrastive.BENCHMARK, bench_sigmoid.BENCHMARK, bench_step.BENCHMARK):
        measured = [asdict(case) for cases in benchmark.sets.values() for case in cases]
        wanted = [case for name, case in asked if name == benchmark.name]
        assert wanted
        assert [case for case in wanted if case not in measured] == []
