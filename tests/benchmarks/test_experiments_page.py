"""The page of experiments: what programs wrote, with where it is from, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import experiments_page
from benchmarks.blocks import fenced, markers, with_block

PROVENANCE = {
    "commit": "0123456789abcdef+",
    "date": "2030-01-02T00:00:00+00:00",
    "machine": "x86_64, 2 CPUs",
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
}


def _result(folder: Path, name: str, text: str, content: dict[str, object]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_result_becomes_a_block_with_where_it_is_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _result(tmp_path / "results", "scaling", "error 1 %\n", {"provenance": PROVENANCE})
    begin, end = markers("scaling")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin}\n{end}\nafter\n")
    arguments = ["--page", str(page), "--results", str(tmp_path / "results")]
    assert experiments_page.main([*arguments, "--check"]) == 1
    assert "out of date: run python -m benchmarks.experiments_page" in capsys.readouterr().out
    assert experiments_page.main(arguments) == 0
    origin = "x86_64, 2 CPUs, Python 3.12.1, torch 2.13.0, commit 0123456789+, 2030-01-02."
    block = f"{begin}\n{origin}\n\n```text\nerror 1 %\n```\n{end}"
    assert page.read_text() == f"before\n{block}\nafter\n"
    assert experiments_page.main([*arguments, "--check"]) == 0


def test_models_trained_at_other_commits_are_named(tmp_path: Path) -> None:
    content = {"provenance": PROVENANCE, "trained_at": ["a" * 40 + "+", "unknown"]}
    _result(tmp_path, "scaling", "error 1 %\n", content)
    (block,) = experiments_page.blocks(tmp_path).values()
    assert "2030-01-02. Its models were trained at aaaaaaaaaa+, unknown." in block
    _result(tmp_path, "scaling", "x\n", {**content, "trained_at": [PROVENANCE["commit"]]})
    assert "trained" not in experiments_page.blocks(tmp_path)["scaling"]


@pytest.mark.parametrize(
    ("page", "content", "said"),
    [
        ("no place\n", {"provenance": PROVENANCE}, markers("scaling")[0]),
        ("{0}\n{1}\n", {}, "does not say where it is from"),
        ("{0}\n{1}\n", {"provenance": {**PROVENANCE, "versions": {}}}, "KeyError('python')"),
        ("{0}\n{1}\n{2}\n{3}\n", {"provenance": PROVENANCE}, "of its block gone"),
    ],
)
def test_pages_and_results_that_do_not_fit_are_refused(
    page: str,
    content: dict[str, object],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _result(tmp_path / "results", "scaling", "error 1 %\n", content)
    path = tmp_path / "page.md"
    path.write_text(page.format(*markers("scaling"), *markers("gone")))
    arguments = ["--page", str(path), "--results", str(tmp_path / "results")]
    assert experiments_page.main([*arguments, "--check"]) == 2
    assert said in capsys.readouterr().err


def test_absent_results_and_pages_are_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    assert experiments_page.main(["--page", str(page)]) == 2
    page.write_text("")
    assert experiments_page.main(["--page", str(page), "--results", str(tmp_path / "typo")]) == 2
    assert "typo has no result" in capsys.readouterr().err


def test_text_cannot_leave_its_block(tmp_path: Path) -> None:
    begin, end = markers("a")
    assert fenced("x ```` y\n") == "`````text\nx ```` y\n`````"
    with pytest.raises(ValueError, match="holds the marker"):
        with_block(f"{begin}\n{end}\n", "a", f"x\n{markers('b')[1]}")


def test_the_projects_page_is_up_to_date() -> None:
    page = experiments_page.PAGE.read_text(encoding="utf-8")
    found = experiments_page.blocks()
    assert found
    for name, text in found.items():
        assert with_block(page, name, text) == page
