"""Verbs, overrides in any place, and errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastclip import cli
from fastclip.config import TrainConfig
from fastclip.recipes import RECIPES
from fastclip.recipes.smoke import smoke


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "smoke", "run.steps=7", "run.seed=3", "--data", "x", "--dry-run"],
        ["train", "smoke", "--data", "x", "run.steps=7", "--dry-run", "run.seed=3"],
        ["--local_rank=1", "train", "smoke", "--dry-run", "--data=x", "run.steps=7", "run.seed=3"],
    ],
)
def test_overrides_stand_anywhere(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(arguments) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["run"]["steps"] == 7
    assert config["run"]["seed"] == 3
    assert config["data"]["train"] == "x"


def test_the_last_override_wins(capsys: pytest.CaptureFixture) -> None:
    cli.main(["train", "smoke", "run.seed=1", "--dry-run", "run.seed=2"])
    assert json.loads(capsys.readouterr().out)["run"]["seed"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "smok"], "did you mean 'smoke'?"),
        (["train", "smoke", "run.stepz=3"], "did you mean 'steps'?"),
        (["train", "smoke", "run.steps=many"], "run.steps"),
        (["train", "no.such.module:recipe"], "cannot import no.such.module"),
        (["train", "fastclip.recipes.smoke:smoking"], "no function 'smoking'"),
        (["train", "smoke", "--data", "/nowhere/*.tar", "run.device=cpu"], "no file matches"),
        (["eval", "/nowhere"], "/nowhere"),
        (["show", "/nowhere"], "/nowhere"),
        (["export", "/nowhere", "/tmp/x"], "/nowhere"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1] == "(FASTCLIP_TRACEBACK=1 shows where)"
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["train", "smoke", "--nope"], ["doctor", "a=b"], []])
def test_unknown_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: fastclip" in capsys.readouterr().err


def test_a_word_that_is_no_override_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "smoke", "x"]) == 1
    assert "an override is written field.name=value, not 'x'" in capsys.readouterr().err


def test_recipes_are_listed_and_complete(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert isinstance(recipe("data"), TrainConfig)
        assert f"{name} " in listed
    assert all(len(line.split(maxsplit=1)) == 2 for line in listed.splitlines())
    assert cli.find_recipe("fastclip.recipes.smoke:smoke") is smoke


def test_doctor_prints(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor"]) == 0
    assert "training engine" in capsys.readouterr().out


def test_synthetic_shards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["data", "synthetic", str(tmp_path / "s"), "--pairs", "5", "--image-size", "16"]
    assert cli.main(command) == 0
    assert (tmp_path / "s" / "00000.tar").is_file()
    assert cli.main(command) == 1
    assert "choose an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "torn_down"), [(None, True), ("1", False)])
def test_a_rank_leaves_without_destructors(rank: str | None, torn_down: bool) -> None:
    program = """
import atexit
from fastclip.cli import leave
class Group:
    def __del__(self): print("torn down")
kept = Group()
atexit.register(print, "exit handler")
print("last words", end=" ")
leave(75)
"""
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    if rank is not None:
        environment["RANK"] = rank
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 75
    assert done.stdout.startswith("last words exit handler\n")
    assert ("torn down" in done.stdout) == torn_down


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["eval", "nowhere", "--json", "."], "is a folder: name a file in it"),
        (["eval", "nowhere", "--datasets", ".", "--json", "."], "is a folder"),
        (
            ["eval", "nowhere", "--datasets", ".", "--few-shot", "--figure", "x.jpg"],
            "x.jpg is written as .png or .svg",
        ),
        (["eval", "nowhere", "--datasets", ".", "--figure", "x.png"], "--figure draws what"),
        (["eval", "nowhere", "--linear-probe"], "--linear-probe goes with --datasets"),
        (["eval"], "needs a run's folder"),
        (["experiment", "robustness", "x", "--seen", "a", "--unseen", "a"], "not a twice"),
    ],
)
def test_where_results_go_is_checked_first(
    options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(options) == 1
    assert message in capsys.readouterr().err
