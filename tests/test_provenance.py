"""Where numbers come from: which commit, and when none is known."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from fastclip import __version__
from fastclip.provenance import commit, provenance


def _git(folder: Path, *arguments: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *settings, *arguments],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "tree" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    _git(folder, "init", "-q")
    _git(folder, "add", ".")
    _git(folder, "commit", "-qm", "first")
    return folder


def test_a_changed_package_is_marked_and_files_beside_it_do_not_count(package: Path) -> None:
    head = _git(package, "rev-parse", "HEAD")
    assert commit(package) == head
    (package.parent / "notes.txt").write_text("beside")
    assert commit(package) == head
    (package / "new.py").write_text("")
    assert commit(package) == f"{head}+"


def test_an_installed_package_has_no_commit_of_the_repository_around_it(package: Path) -> None:
    installed = package.parent / "site-packages" / "other"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert commit(installed) is None


def test_without_a_repository_or_git_there_is_no_commit(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "plain").mkdir()
    assert commit(tmp_path / "plain") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(package) is None


def test_it_names_date_machine_and_versions() -> None:
    found = provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["fastclip"] == __version__
    assert found["date"].endswith("+00:00")
    assert found["machine"]
