"""The training loop around its steps: what is saved when, what a signal and a resume do."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fastclip import cli, train
from fastclip.checkpoint_folder import complete_checkpoints, step_tag
from fastclip.engine.step_guard import StepGuard
from fastclip.run import Run
from shards import write_shards

PAIRS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), pairs=PAIRS)


def _train(data: Path, run: Path, *overrides: str) -> int:
    settings = (
        "model.vision.layers=1", "model.text.layers=1", "optim.warmup_steps=1", "run.steps=6",
        "run.global_batch_size=8", "run.checkpoint_every_steps=2", "run.keep_checkpoints=9",
        "run.log_every_steps=1", "run.tensorboard=false", "run.device=cpu",
        f"run.directory={run}",
    )  # fmt: skip
    return cli.main(["train", "smoke", f"--data={data}", *settings, *overrides])


def _retrieval(shards: Path | str) -> str:
    return "eval.retrieval=" + json.dumps([{"name": "pairs", "shards": str(shards)}])


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _evaluated(run: Path) -> list[int]:
    return [row["step"] for row in _rows(run) if any("retrieval/pairs" in name for name in row)]


def _saved(run: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in complete_checkpoints(run / "checkpoints")]


def _after_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[Run], object]) -> None:
    """Have something happen after the steps of this number."""
    one_step = Run.one_step

    def stepped(self: Run) -> Any:
        result = one_step(self)
        if self.step == step:
            do(self)
        return result

    monkeypatch.setattr(Run, "one_step", stepped)


def _terminate(run: Run) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _pretend_skipped(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Have the guard say that the updates of these steps were skipped, the earlier ones not."""
    done: list[int] = [0]
    monkeypatch.setattr(StepGuard, "skipped_in_a_row", lambda self: int(done[0] in steps))
    one_step = Run.one_step

    def stepped(self: Run) -> Any:
        result = one_step(self)
        done[0] = self.step
        return result

    monkeypatch.setattr(Run, "one_step", stepped)


def test_missing_evaluation_data_stop_a_run_before_it_trains(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _train(data, run, _retrieval(tmp_path / "gone")) == 1
    assert "eval.retrieval, task pairs: no file matches" in capsys.readouterr().err
    task = [{"name": "names", "shards": str(data), "classes": str(tmp_path / "gone.json")}]
    assert _train(data, run, f"eval.zero_shot={json.dumps(task)}") == 1
    assert "eval.zero_shot, task names: " in capsys.readouterr().err
    assert not run.exists()


def test_what_was_trained_is_saved_before_an_evaluation_that_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def broken(*arguments: Any) -> Any:
        raise ValueError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(train, "run_suite", broken)
        assert _train(data, run, _retrieval(data)) == 1
    assert _saved(run)[-1] == 6
    assert _evaluated(run) == []
    assert _train(data, run, _retrieval(data)) == 0  # trains nothing, evaluates
    assert _evaluated(run) == [6]
    assert len([row for row in _rows(run) if "loss" in row]) == 6
    assert _train(data, run, _retrieval(data)) == 0
    assert _evaluated(run) == [6]


def test_an_evaluation_that_a_signal_has_kept_off_is_made_later(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = (_retrieval(data), "run.evaluate_every_steps=2")
    with monkeypatch.context() as patch:
        _after_step(patch, 4, _terminate)
        assert _train(data, run, *options) == cli.EXIT_STOPPED
    assert _evaluated(run) == [2]
    assert _train(data, run, *options) == 0
    assert _evaluated(run) == [2, 4, 6]


def test_a_signal_amid_skipped_updates_waits_for_a_good_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    _pretend_skipped(monkeypatch, 3, 4)
    _after_step(monkeypatch, 3, _terminate)
    assert _train(data, run, "run.checkpoint_every_steps=none") == cli.EXIT_STOPPED
    assert _saved(run) == [5]


def test_a_checkpoint_that_falls_on_a_skipped_update_comes_after_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    _pretend_skipped(monkeypatch, 2)
    assert _train(data, run) == 0
    assert _saved(run) == [3, 4, 6]


def test_a_run_that_ends_amid_skipped_updates_keeps_what_was_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _pretend_skipped(monkeypatch, 6)
    assert _train(data, run, "run.keep_checkpoints=1") == 0
    assert _saved(run) == [4, 6]
    assert "the last 1 update(s) of the run were skipped" in capsys.readouterr().err


def test_a_checkpoint_of_a_broken_model_is_passed_over(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _train(data, run, "run.steps=4") == 0
    weights = run / "checkpoints" / step_tag(4) / "model.safetensors"
    broken = {name: tensor * float("nan") for name, tensor in load_file(weights).items()}
    save_file(broken, weights)
    assert _train(data, run, "engine.max_skipped_steps=2", "run.steps=8") == 0
    assert f"{step_tag(4)}: not one good update has followed it" in capsys.readouterr().err
    assert (run / "checkpoints" / f".diverged-{step_tag(4)}-1").is_dir()
    assert (run / "checkpoints" / "latest").read_text() == f"{step_tag(8)}\n"
    assert _saved(run) == [2, 4, 6, 8]
    assert all(row["update_applied"] for row in _rows(run))


def test_settings_that_let_nothing_be_learnt_cost_no_checkpoint(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _train(data, run, "run.steps=4") == 0
    overflow = ("engine.precision=fp16", "engine.initial_loss_scale=1e38")
    assert _train(data, run, *overflow, "engine.max_skipped_steps=2", "run.steps=8") == 1
    assert _saved(run) == [2, 4]
    assert (run / "checkpoints" / "latest").read_text() == f"{step_tag(4)}\n"


@pytest.mark.parametrize(
    ("batch", "steps"),
    [(8, 9), (4, 15), (24, 5)],  # 3 epochs of 24 pairs, 24 of them in batches of 8 before
)
def test_epochs_are_of_pairs_whatever_the_batches(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, steps: int
) -> None:
    run = tmp_path / "run"
    options = ("run.steps=none", "run.epochs=3")
    with monkeypatch.context() as patch:
        _after_step(patch, 3, _terminate)
        assert _train(data, run, *options) == cli.EXIT_STOPPED
    assert _train(data, run, *options, f"run.global_batch_size={batch}") == 0
    assert _rows(run)[-1]["step"] == steps
    assert _rows(run)[-1]["epoch"] == 3.0


def test_halves_of_a_batch_do_not_depend_on_where_one_has_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """72 pairs: 32 in batches of 8, and 2.5 batches of 16."""
    run = tmp_path / "run"
    for batch, stop in ((8, 4), (16, 5)):
        with monkeypatch.context() as patch:
            _after_step(patch, stop, _terminate)
            options = ("run.steps=none", "run.epochs=3", f"run.global_batch_size={batch}")
            assert _train(data, run, *options) == cli.EXIT_STOPPED
    assert _train(data, run, *options) == 0
    assert _rows(run)[-1]["step"] == 7


def test_a_folder_that_cannot_be_written_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert _train(data, tmp_path / "file" / "run") == 1
    assert "file/run cannot be written: Not a directory" in capsys.readouterr().err


def test_a_run_that_has_nothing_left_to_do_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(data, tmp_path / "run") == 0
    assert _train(data, tmp_path / "run", "run.steps=5") == 0
    assert "nothing is left to train: step 6 of 5" in capsys.readouterr().err


def test_a_run_begun_anew_keeps_the_metrics_of_the_one_before(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _train(data, run) == 0
    before = (run / "metrics.jsonl").read_text()
    assert _train(data, run, "run.resume=false", "run.steps=2") == 0
    assert (run / ".superseded-1-metrics.jsonl").read_text() == before
    assert [row["step"] for row in _rows(run)] == [1, 2]


def test_a_profile_wants_a_folder_of_its_own(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(data, run / "checkpoints")
    assert cli.main(["profile", "smoke", f"--data={data}", "--out", str(run)]) == 1
    assert "holds a run (checkpoints): give the profile another folder" in capsys.readouterr().err


def test_a_folder_belongs_to_one_launch(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert _train(data, run) == 1
        assert "another process trains in" in capsys.readouterr().err
    assert _train(data, run, "run.steps=2") == 0


def test_a_signal_that_comes_twice_at_once_is_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Run) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal does, and then a launcher
        os.kill(os.getpid(), signal.SIGTERM)

    _after_step(monkeypatch, 3, interrupted)
    assert _train(data, tmp_path / "run") == cli.EXIT_STOPPED
    assert _saved(tmp_path / "run") == [2, 3]


def test_a_second_signal_later_ends_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_SECONDS_OF_ONE_SIGNAL", -1.0)
    _after_step(monkeypatch, 3, lambda run: (_terminate(run), _terminate(run)))
    assert _train(data, tmp_path / "run") not in (0, cli.EXIT_STOPPED)
    assert _saved(tmp_path / "run") == [2]


def test_a_stop_does_not_wait_for_a_rare_log_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_SECONDS_BETWEEN_CHECKS", 0.0)
    _after_step(monkeypatch, 8, _terminate)
    options = ("run.log_every_steps=30", "run.steps=40", "run.checkpoint_every_steps=none")
    assert _train(data, tmp_path / "run", *options) == cli.EXIT_STOPPED
    assert _saved(tmp_path / "run") == [8]


def test_what_deepspeed_refuses_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text('{"gradient_predivide_factor": 2.0}')
    options = ("engine.zero_stage=2", f"engine.deepspeed_json={settings}")
    assert _train(data, tmp_path / "run", *options) == 1
    assert "DeepSpeed refuses the engine's settings: gradient_pre" in capsys.readouterr().err
