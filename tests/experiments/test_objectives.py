"""The comparison of objectives: one stream, exact resumption, ratios, and the whole of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastclip.config import RunConfig, TrainConfig
from fastclip.data.config import DataConfig
from fastclip.engine.config import EngineConfig
from fastclip.eval.suite import EvalConfig
from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.experiments import objective_training, objectives
from fastclip.experiments.objective_models import OBJECTIVES, Objective
from fastclip.experiments.objective_results import (
    Ratio,
    bootstrap,
    curve,
    efficiency,
    images_to_reach,
    ratios,
    sensitivity,
)
from fastclip.experiments.objective_training import (
    ObjectiveRun,
    RunSettings,
    train_objective,
    training_loader,
)
from fastclip.experiments.objectives import SEARCH_TASK, TASKS, Preset, run_objectives
from fastclip.models.config import ResNetConfig
from fastclip.models.presets import preset
from fastclip.optim import OptimConfig
from fastclip.tokenizer import Tokenizer
from shards import write_shards

NAMES = (*TASKS, SEARCH_TASK)


def _config(folder: Path) -> TrainConfig:
    shards = write_shards(folder, pairs=48)
    model = preset("RN-Nano")
    return TrainConfig(
        model=dataclasses.replace(
            model,
            vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4),
            text=dataclasses.replace(model.text, layers=1),
        ),
        data=DataConfig(train=str(shards), workers=1, crop_scale=(0.7, 1.0), positives="label"),
        optim=OptimConfig(warmup_steps=1),
        engine=EngineConfig(zero_stage=0, precision="fp32", gradient_clipping=1.0),
        eval=EvalConfig(
            zero_shot=tuple(
                ZeroShotTask(name=name, shards=str(shards), classes=str(folder / "classes.json"))
                for name in NAMES
            )
        ),
        run=RunConfig(directory=str(folder / "none"), global_batch_size=16, steps=9),
    )


def _settings(objective: Objective, evaluate_at: tuple[int, ...] = (2, 4)) -> RunSettings:
    return RunSettings(
        objective=objective,
        seed=3,
        learning_rate=1e-3,
        evaluate_at=evaluate_at,
        tasks=TASKS[:1],
        variants=True,
    )


def test_all_objectives_see_one_stream(tmp_path: Path) -> None:
    config = _config(tmp_path)
    streams = []
    for objective in OBJECTIVES:
        with training_loader(_settings(objective), config, Tokenizer(context_length=32)) as loader:
            streams.append([next(loader) for _ in range(4)])
    for stream in streams[1:]:
        for batch, first in zip(stream, streams[0], strict=True):
            assert batch.keys == first.keys
            assert torch.equal(batch.images, first.images)
            assert batch.ids is not None
            assert first.ids is not None
            assert torch.equal(batch.ids, first.ids)
    assert streams[0][0].keys != streams[0][3].keys


@pytest.mark.parametrize("objective", ["language_model", "convirt"])
def test_a_killed_run_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: Objective
) -> None:
    config, settings = _config(tmp_path), _settings(objective, (2, 5))
    whole = train_objective(settings, config, tmp_path / "whole")
    evaluate = ObjectiveRun.evaluate

    def killed(run: ObjectiveRun) -> dict[str, float]:
        if run.step == 5:
            raise KeyboardInterrupt
        return evaluate(run)

    monkeypatch.setattr(objective_training, "_CHECKPOINT_STEPS", 3)
    monkeypatch.setattr(ObjectiveRun, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        train_objective(settings, config, tmp_path / "cut")
    assert len((tmp_path / "cut" / "results.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(ObjectiveRun, "evaluate", evaluate)
    steps = []
    one_step = ObjectiveRun.one_step
    monkeypatch.setattr(
        ObjectiveRun, "one_step", lambda run: (steps.append(run.step), one_step(run))[1]
    )
    assert train_objective(settings, config, tmp_path / "cut") == whole
    assert steps == [3, 4]
    assert train_objective(settings, config, tmp_path / "cut") == whole
    assert steps == [3, 4]  # what is finished is read again
    assert [row["images"] for row in whole] == [32, 80]
    names = {name.split("/")[1] for name in whole[-1] if name.count("/") == 2}
    assert names == ({"mean", "corrected"} if objective == "language_model" else set())


def test_averaged_weights_follow_the_polynomial_rule(tmp_path: Path) -> None:
    with ObjectiveRun(_settings("bag_of_words"), _config(tmp_path), tmp_path) as run:
        name = "head.words.weight"
        expected = run.model.state_dict()[name].clone()
        for step in range(1, 4):
            run.one_step()
            rate = 9 / (step + 8)
            expected = (1 - rate) * expected + rate * run.model.state_dict()[name]
            torch.testing.assert_close(run.averaged.state_dict()[name], expected)
        assert not torch.equal(expected, run.model.state_dict()[name])


def test_folders_of_other_settings_and_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    config, folder = _config(tmp_path), tmp_path / "run"
    train_objective(_settings("bag_of_words", (2,)), config, folder)
    with pytest.raises(ValueError, match="run of other settings"):
        train_objective(_settings("bag_of_words", (2, 3)), config, folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        train_objective(_settings("bag_of_words", (2,)), config, other)
    with pytest.raises(ValueError, match="rising steps"):
        _settings("convirt", (4, 2))


def test_images_to_reach_interpolates_in_the_logarithm() -> None:
    images, accuracy = [1000, 4000, 16000], [0.1, 0.2, 0.15]
    between = images_to_reach(images, accuracy, 0.15)
    assert (between.value, between.bound) == (pytest.approx(2000), "equal")
    assert images_to_reach(images, accuracy, 0.2) == Ratio(4000, "equal")
    assert images_to_reach(images, accuracy, 0.05) == Ratio(1000, "less")
    assert images_to_reach(images, accuracy, 0.3) == Ratio(16000, "more")


def test_efficiency_says_what_it_cannot_know() -> None:
    images = [1000, 4000, 16000]
    slow = [0.0, 0.1, 0.15]
    assert str(efficiency(images, [0.1, 0.2, 0.3], slow)) == "8.0×"
    assert str(efficiency(images, [0.2, 0.3, 0.4], slow)) == "more than 16.0×"
    assert str(efficiency(images, [0.0, 0.1, 0.12], slow)) == "less than 1.0×"
    assert str(efficiency(images, slow, slow)) == "1.0×"


def test_bootstrap_resamples_seeds_in_pairs() -> None:
    images = [1000, 4000]
    better, other = [[0.1, 0.2], [0.2, 0.3]], [[0.0, 0.1], [0.0, 0.2]]
    # Each seed by itself has 4; so has every mean of the two.
    found = bootstrap(images, better, other)
    assert found is not None
    assert [str(end) for end in found] == ["4.0×", "4.0×"]
    found = bootstrap(images, [[0.0, 0.1], [0.2, 0.3]], other)
    assert found is not None
    assert [str(end) for end in found] == ["1.0×", "4.0×"]
    assert bootstrap(images, better[:1], other[:1]) is None


def test_other_scores_are_compared_too() -> None:
    def rows(accuracies: list[float], **others: float) -> list[list[dict[str, float]]]:
        points = [{"images": 1000 * 4**n, "t/top1": value} for n, value in enumerate(accuracies)]
        points[-1] |= {f"t/{name}/top1": value for name, value in others.items()}
        return [points]

    predicted = rows([0.1, 0.2])
    predicted[0][0]["t/sum/top1"], predicted[0][1]["t/sum/top1"] = 0.0, 0.1
    runs: dict[Objective, list[list[dict[str, float]]]] = {
        "language_model": rows([0.0, 0.1], mean=0.05),
        "bag_of_words": predicted,
        "bag_of_words_contrastive": rows([0.1, 0.4]),
        "transformer_contrastive": rows([0.1, 0.4]),
        "convirt": rows([0.1, 0.4]),
    }
    assert [row["ratio"] for row in ratios(runs, "t")[:2]] == ["4.0×", "2.5×"]
    found = {
        (row["score"], row["over_score"]): row["ratio"]
        for row in sensitivity(runs, "t")
        if (row["objective"], row["over"]) == ("bag_of_words", "language_model")
    }
    assert found == {("", "mean"): "more than 4.0×", ("sum", ""): "1.0×", ("sum", "mean"): "2.0×"}


def test_curve_has_students_interval() -> None:
    runs = [[{"images": 100, "x": value}] for value in (0.1, 0.2, 0.3)]
    drawn = curve(runs, "x")
    reach = 4.302653 * 0.1 / 3**0.5  # t of 2 degrees of freedom
    assert drawn.mean == [pytest.approx(0.2)]
    assert (drawn.low, drawn.high) == ([pytest.approx(0.2 - reach)], [pytest.approx(0.2 + reach)])
    assert curve(runs[:1], "x").low == [0.1]


def test_the_whole_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = _config(tmp_path), tmp_path / "out"
    small = Preset(seeds=1, evaluate_at=(2, 3), search_steps=2)
    monkeypatch.setattr(objectives, "LEARNING_RATES", (1e-3, 1e30))  # the latter diverges
    text = run_objectives(config, out, small, jobs=1)
    for phrase in ("bag of words, predicted over transformer language model", "paper: 3×", "sum"):
        assert phrase in text
    results = json.loads((out / "objectives.json").read_text())
    assert set(results["runs"]) == set(results["learning_rates"]) == set(OBJECTIVES)
    assert set(results["learning_rates"].values()) == {1e-3}
    diverged = [row for row in results["learning_rate_search"] if row["learning_rate"] == 1e30]
    assert [row["loss"] for row in diverged] == [None] * 5
    for rows in results["runs"].values():
        assert [row["images"] for row in rows[0]] == [32, 48]
    assert (out / "objectives.png").stat().st_size > 10_000
    assert "<svg" in (out / "objectives.svg").read_text()
    assert (out / "objectives.txt").read_text() == f"{text}\n"

    written = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/results.jsonl")}
    assert len(written) == 5
    monkeypatch.setattr(objectives, "LEARNING_RATES", (1e-3,))
    assert run_objectives(config, out, small, jobs=1) == text
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/results.jsonl")}


def test_configs_that_do_not_fit(tmp_path: Path) -> None:
    config = _config(tmp_path)
    small = Preset(seeds=1, evaluate_at=(2,), search_steps=0)
    fewer = dataclasses.replace(config, eval=EvalConfig(zero_shot=config.eval.zero_shot[:2]))
    with pytest.raises(ValueError, match="lacks digits, fxemoji"):
        run_objectives(fewer, tmp_path / "out", small, jobs=1)
    with pytest.raises(ValueError, match="at least 1"):
        run_objectives(config, tmp_path / "out", small, jobs=0)
