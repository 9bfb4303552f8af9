"""`robustness`: the line and what exceeds it by hand; runs evaluated once, and named."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.evaluate import evaluate
from fastclip.experiments.robustness import (
    Count,
    Measured,
    Robustness,
    add_robustness_verb,
    fit_line,
    format_robustness,
    run_robustness,
)
from shards import COLOURS, SHAPES, sample, write_tar
from small_runs import write_run


def _model(seen: int, unseen: int, baseline: bool = True, images: int = 1000) -> Measured:
    return Measured(
        checkpoint=f"runs/r/checkpoints/step-{seen:08d}",
        run="r",
        baseline=baseline,
        seen=Count(right=seen, images=images),
        unseen=Count(right=unseen, images=images),
    )


def test_line_is_least_squares_in_logits() -> None:
    pairs = [(100, 60), (300, 180), (500, 390), (800, 610)]
    line, note = fit_line([*(_model(*pair) for pair in pairs), _model(500, 900, baseline=False)])
    x, y = np.log(np.array(pairs) / (1000 - np.array(pairs))).T
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    intercept = y.mean() - slope * x.mean()
    assert line is not None
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept))
    residual = y - slope * x - intercept
    spread = ((y - y.mean()) ** 2).sum()
    assert line.r_squared == pytest.approx(1 - (residual**2).sum() / spread)
    assert line(0.5) == pytest.approx(1 / (1 + np.exp(-intercept)))
    assert note.startswith("line of 4 baselines")


def test_effective_robustness_is_what_exceeds_the_line() -> None:
    baselines = [_model(200, 200), _model(500, 500), _model(800, 800)]
    robust, perfect = _model(600, 750, baseline=False), _model(1000, 990, baseline=False)
    models = [*baselines, robust, perfect]
    line, note = fit_line(models)
    result = Robustness(seen="a", unseen="b", models=models, line=line, note=note)
    assert [result.effective(model) for model in baselines] == pytest.approx([0, 0, 0], abs=1e-12)
    assert result.effective(robust) == pytest.approx(0.15)
    assert result.effective(perfect) is None  # its logit is infinite
    lines = format_robustness(result).splitlines()
    assert lines[4].split() == ["r/step-00000600", "60.00%", "75.00%", "60.00%", "+15.00"]
    assert lines[5].split()[-2:] == ["-", "-"]
    assert lines[1].split()[1] == "(baseline)"


def test_no_line_is_drawn_through_too_little() -> None:
    line, note = fit_line([_model(200, 200), _model(500, 500), _model(0, 10), _model(9, 1000)])
    assert line is None
    assert note == "no line: 2 baseline(s) of the 3 that it needs; 2 at 0 or 100 % left out"
    line, note = fit_line([_model(200, 100), _model(200, 200), _model(200, 300)])
    assert line is None
    assert "have one accuracy" in note
    line, _ = fit_line([_model(500, 100), _model(501, 500), _model(502, 900)])
    assert line is not None
    assert 0 < line(0.001) < line(0.999) < 1  # as steep as it is


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of two checkpoints, and tasks of 24 images."""
    folder = tmp_path_factory.mktemp("robustness")
    for name, first in (("near", 0), ("far", 50)):
        (folder / name).mkdir()
        write_tar(folder / name / "0.tar", [sample(n) for n in range(first, first + 24)])
    labels = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    classes = folder / "classes.json"
    classes.write_text(json.dumps({"label_field": "label", "classes": labels}))
    tasks = [
        ZeroShotTask(name=name, shards=str(folder / name), classes=str(classes), templates=("{}",))
        for name in ("near", "far")
    ]
    write_run(folder / "first", train=str(folder / "near"), tasks=tasks, seeds=(1, 2))
    write_run(folder / "second", train=str(folder / "near"), tasks=(), seeds=(3,))
    return folder


def test_all_checkpoints_of_all_runs_are_evaluated_once(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("fastclip").propagate = True
    caplog.set_level(logging.INFO, "fastclip")
    linked = tmp_path / "linked"
    linked.symlink_to(runs / "first")
    paths = [linked, runs / "second" / "checkpoints" / "step-00000001"]
    result = run_robustness(paths, seen="near", unseen="far", out=tmp_path, device="cpu")
    assert result.models[0].checkpoint == str(linked / "checkpoints" / "step-00000001")  # as given
    assert [(m.run, m.checkpoint[-8:], m.seen.images) for m in result.models] == [
        ("first", "00000001", 24),
        ("first", "00000002", 24),
        ("second", "00000001", 24),
    ]
    assert len(caplog.messages) == 6
    numbers, _ = evaluate(runs / "first", [], device="cpu")
    newest = result.models[1]
    assert newest.seen.accuracy == pytest.approx(numbers["zero_shot/near/top1"])
    assert newest.unseen.accuracy == pytest.approx(numbers["zero_shot/far/top1"])
    report = json.loads((tmp_path / "robustness.json").read_text())
    assert report["models"][1]["unseen"]["accuracy"] == newest.unseen.accuracy
    low, high = report["models"][1]["unseen"]["interval"]
    assert low <= newest.unseen.accuracy <= high
    assert (tmp_path / "robustness.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "robustness.txt").read_text() == f"{format_robustness(result)}\n"

    caplog.clear()
    again = run_robustness(
        [*paths, runs / "second", runs / "first"],
        seen="near",
        unseen="far",
        out=tmp_path,
        device="cpu",
    )
    assert not caplog.messages  # all counts were kept, and one checkpoint named twice is one model
    assert again == result
    texts = ['eval.zero_shot=' + json.dumps([
        {**_task(runs, name), "templates": ["a {}"]} for name in ("near", "far")
    ])]  # fmt: skip
    run_robustness(
        paths[1:] + paths[:1],
        seen="near",
        unseen="far",
        out=tmp_path,
        overrides=texts,
        device="cpu",
    )
    assert len(caplog.messages) == 6  # other prompts are another evaluation


def _task(runs: Path, name: str) -> dict[str, str]:
    return {"name": name, "shards": str(runs / name), "classes": str(runs / "classes.json")}


def test_the_line_is_of_the_baselines_alone(runs: Path, tmp_path: Path) -> None:
    result = run_robustness(
        [runs / "first" / "checkpoints" / "step-00000001"],
        seen="near",
        unseen="far",
        out=tmp_path,
        baselines=[runs / "second"],
        device="cpu",
    )
    assert [(model.run, model.baseline) for model in result.models] == [
        ("first", False),
        ("second", True),
    ]
    assert result.line is None
    assert "of the 3 that it needs" in result.note


def test_the_verb_tells_settings_from_runs(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_robustness_verb(parser.add_subparsers())
    words = ["robustness", str(runs / "first"), "eval.batch_size=5", "--seen=near", "--unseen=far"]
    options = parser.parse_args([*words, f"--out={tmp_path}", "--device=cpu"])
    assert options.run(options) == 0
    printed = capsys.readouterr().out
    assert "first/step-00000002 (baseline)" in printed
    assert "no line" in printed
    options = parser.parse_args([*words[:-1], "--unseen=else", f"--out={tmp_path}"])
    with pytest.raises(ValueError, match="no zero-shot task 'else'"):
        options.run(options)
    options = parser.parse_args(["robustness", str(tmp_path / "no"), "--seen=a", "--unseen=b"])
    with pytest.raises(FileNotFoundError, match="neither a run's folder"):
        options.run(options)
