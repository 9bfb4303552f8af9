"""The step's benchmark: runs, refuses a wrong loss, counts what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bench_step, caption_lengths, harness, record
from benchmarks.bench_step import BENCHMARK
from benchmarks.steps import FastclipStep, StepCase, normalised


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--seconds", "0.001", "--commit", "abc", "--out", str(tmp_path)]
    providers = ["fastclip", "open_clip", "fastclip-padded-all-rows"]
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


def test_the_comparison_comes_first_and_the_rest_where_it_can_tell_something() -> None:
    assert [provider.name for provider in BENCHMARK.providers[:4]] == [
        "fastclip", "open_clip-compiled", "fastclip-compiled", "open_clip",
    ]  # fmt: skip

    def accepted(case: StepCase) -> set[str]:
        return {provider.name for provider in BENCHMARK.providers if provider.accepts(case)}

    every = {provider.name for provider in BENCHMARK.providers}
    common = {"fastclip", "fastclip-compiled", "fastclip-padded", "open_clip", "open_clip-compiled"}
    by_model = {case.model: accepted(case) for case in BENCHMARK.sets["small"]}
    assert by_model == {"ViT-B-32": every, "ViT-B-16": common, "ViT-L-14": common}
    for case in (*BENCHMARK.sets["large_batch"], *BENCHMARK.sets["maximum"]):
        assert accepted(case) == {"fastclip", "fastclip-compiled"}
    (dropping,) = BENCHMARK.sets["patch_dropout"]
    assert accepted(dropping) == {"fastclip", "fastclip-compiled", "fastclip-padded"}


def test_cases_fit_on_80_gb() -> None:
    # Of a pair: what open_clip keeps for backward, which is the most of all. Of the model: weights,
    # gradients and statistics. open_clip's pixels are in bfloat16 beside ours.
    megabytes = {"ViT-B-32": 42, "ViT-B-16": 110, "ViT-L-14": 320, "RN50": 110}
    states = {"ViT-B-32": 3e9, "ViT-B-16": 3e9, "ViT-L-14": 7e9, "RN50": 3e9}
    for name in ("small", "dense", "grid", "large_batch", "patch_dropout", "maximum"):
        for case in BENCHMARK.sets[name]:
            images = case.batch * 3 * 224**2
            pixels = 3 * images if case.micro_batches == 1 else images
            kept = case.batch // case.micro_batches * megabytes[case.model] * 1e6
            assert case.batch % case.micro_batches == 0
            assert kept + pixels + states[case.model] < 72e9, (name, case)


def test_pixels_are_drawn_once_for_all_and_normalised_for_open_clip() -> None:
    case = StepCase("ViT-Nano-8", 1030, "web", "bf16")
    images, _ = bench_step.make_operands(case, torch.device("cpu"))
    assert images.dtype == torch.uint8
    assert torch.equal(images, bench_step.make_operands(case, torch.device("cpu")).images)
    assert not torch.equal(images[:6], images[1024:])
    assert 127 < images.float().mean() < 128
    pixels = normalised(images, case.config, torch.bfloat16)
    assert pixels.dtype == torch.bfloat16
    mean, std = case.config.image_mean[1], case.config.image_std[1]
    wanted = (images[1029, 1].double() / 255 - mean) / std
    assert torch.allclose(pixels[1029, 1].double(), wanted, rtol=1e-2, atol=1e-3)


def test_what_is_left_out() -> None:
    case = StepCase("ViT-B-32", 512)
    shares = {variant.name: variant.work(case).units for variant in BENCHMARK.variants}
    assert shares["fastclip-padded-all-rows"] == 1.0
    assert shares["fastclip-all-rows"] == pytest.approx(0.69, abs=0.01)
    assert shares["fastclip-padded"] == pytest.approx(0.93, abs=0.01)
    assert shares["fastclip"] == pytest.approx(0.645, abs=0.01)
