"""The step's benchmark: runs, refuses a wrong loss, counts what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bench_step, caption_lengths, harness, record
from benchmarks.bench_step import BENCHMARK
from benchmarks.steps import FastclipStep, StepCase


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--seconds", "0.001", "--commit", "abc", "--out", str(tmp_path)]
    providers = ["fastclip", "fastclip-padded-all-rows", "open_clip"]
    assert harness.main(BENCHMARK, [*arguments, "--providers", *providers]) == 0
    rows = record.read_rows(tmp_path / "step.csv")
    assert {row["error"] for row in rows} == {""}
    assert [row["provider"] for row in rows] == 2 * providers
    for row in rows:
        assert float(row["loss_error"]) < 1e-5
        assert float(row["median_ms"]) > 0


def test_micro_batches_patch_dropout_and_the_text_tower_alone(tmp_path: Path) -> None:
    for number, case in enumerate(
        (
            StepCase("ViT-Nano-8", 8, "web", "fp32", micro_batches=4),
            StepCase("ViT-Nano-8", 8, "demo", "bf16", patch_dropout=0.5),
            StepCase("ViT-Nano-8/20", 8, "dense", "fp32", part="text"),
        )
    ):
        operands = bench_step.make_operands(case, torch.device("cpu"))
        expected = bench_step.expected(case, operands)
        step = FastclipStep(case)
        errors = bench_step.errors(expected, step(operands))
        step.close()
        assert errors["loss_error"] is not None, number


def test_a_wrong_loss_gets_no_times() -> None:
    with pytest.raises(RuntimeError, match=r"the loss is 2\.1, not 2"):
        bench_step.errors((2.0, 0.01), torch.tensor(2.1))
    with pytest.raises(RuntimeError, match="the loss is nan"):
        bench_step.errors((2.0, 0.01), torch.tensor(torch.nan))


def test_captions() -> None:
    for name, mean in (("demo", 4.58), ("web", 18.4), ("dense", 77)):
        lengths = caption_lengths.draw(name, 20_000, 77)
        assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.02)
        assert caption_lengths.draw(name, 20_000, 77) == lengths
    assert max(caption_lengths.draw("web", 1000, 20)) == 20
    with pytest.raises(ValueError, match="demo, web or dense"):
        caption_lengths.draw("laion", 3, 77)
    case = StepCase("ViT-Nano-8", 50, "web")
    tokens = bench_step.make_operands(case, torch.device("cpu")).tokens
    assert (tokens.argmax(1) + 1).tolist() == case.lengths()


def test_what_is_left_out() -> None:
    case = StepCase("ViT-B-32", 512)
    shares = {variant.name: variant.work(case).units for variant in BENCHMARK.variants}
    assert shares["fastclip-padded-all-rows"] == 1.0
    assert shares["fastclip-all-rows"] == pytest.approx(0.69, abs=0.01)
    assert shares["fastclip-padded"] == pytest.approx(0.93, abs=0.01)
    assert shares["fastclip"] == pytest.approx(0.645, abs=0.01)
