"""Where numbers come from: which commit, and when none is known."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fastclip import __version__
from fastclip import provenance as module
from fastclip.provenance import commit, launch_commits, note_launch, provenance


def _git(folder: Path, *arguments: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *settings, *arguments],
        check=True, capture_output=True, text=True, env=clean,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a repository, with kernels beside it."""
    tree = tmp_path / "tree"
    for name in ("package/__init__.py", "kernels/__init__.py"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text("")
    _git(tree, "init", "-q")
    _git(tree, "add", ".")
    _git(tree, "commit", "-qm", "first")
    return tree / "package"


def test_changed_files_are_marked_and_those_beside_the_package_are_not(package: Path) -> None:
    head = _git(package, "rev-parse", "HEAD")
    assert commit(package) == head
    (package.parent / "notes.txt").write_text("beside")
    assert commit(package) == head
    (package / "new.py").write_text("")
    assert commit(package) == f"{head}+"


def test_changed_kernels_are_marked(package: Path) -> None:
    (package.parent / "kernels" / "__init__.py").write_text("changed")
    assert commit(package) == f"{_git(package, 'rev-parse', 'HEAD')}+"


def test_an_installed_package_has_no_commit_of_the_repository_around_it(package: Path) -> None:
    installed = package.parent / "site-packages" / "other"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert commit(installed) is None


def test_another_repository_that_hooks_are_told_of_is_not_asked(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = _git(package, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert commit(package) == head


def test_without_a_repository_or_git_there_is_no_commit(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "__init__.py").write_text("")
    assert commit(plain) is None
    assert commit(package) is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(package) is None


def test_launches_tell_the_commits_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / name for name in ("first", "second", "old")]
    for run, found in zip(runs, ("b" * 40, "a" * 40 + "+", None), strict=True):
        run.mkdir()
        monkeypatch.setattr(module, "commit", lambda found=found: found)
        note_launch(run, step=3)
    launch = json.loads((runs[0] / "launches.jsonl").read_text())
    assert launch["commit"] == "b" * 40
    assert launch["step"] == 3
    assert launch["begin"].endswith("+00:00")
    assert launch_commits(runs[:1] * 2) == ["b" * 40]
    assert launch_commits(runs) == ["a" * 40 + "+", "b" * 40, "unknown"]
    assert launch_commits([tmp_path]) == ["unknown"]


def test_it_names_date_machine_and_versions() -> None:
    found = provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["fastclip"] == __version__
    assert found["date"].endswith("+00:00")
    assert found["machine"]
