"""The page of experiments: what programs wrote, with where it is from, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import experiments_page
from benchmarks.blocks import markers, with_block

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


def test_a_result_without_its_place_or_origin_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _result(tmp_path / "results", "scaling", "error 1 %\n", {"provenance": PROVENANCE})
    page = tmp_path / "page.md"
    page.write_text("no place\n")
    arguments = ["--page", str(page), "--results", str(tmp_path / "results")]
    assert experiments_page.main(arguments) == 2
    assert markers("scaling")[0] in capsys.readouterr().err
    _result(tmp_path / "results", "scaling", "error 1 %\n", {})
    with pytest.raises(KeyError, match="provenance"):
        experiments_page.main(arguments)


def test_the_projects_page_is_up_to_date() -> None:
    page = experiments_page.PAGE.read_text(encoding="utf-8")
    found = experiments_page.blocks()
    assert found
    for name, text in found.items():
        assert with_block(page, name, text) == page
