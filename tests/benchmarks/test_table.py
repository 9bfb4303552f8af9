"""The README's table: from rows, only GPU's, newest first; and whether it is up to date."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.bench_contrastive import BENCHMARK
from benchmarks.bench_step import BENCHMARK as STEP
from benchmarks.blocks import markers, with_block
from benchmarks.cases import CONTRASTIVE_SETS, Case
from benchmarks.record import ROOT, Record
from benchmarks.steps import StepCase

BEGIN, END = markers("benchmarks")
HEADLINE = CONTRASTIVE_SETS["headline"][0]


def _write(folder: Path, case: Case = HEADLINE, **cells: object) -> None:
    row = {
        "commit": "0123456789abcdef", "dirty": False, "date": "2030-01-02T00:00:00+00:00",
        "device": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0", "provider": "fastclip",
        "version": "0.1.0", **asdict(case), "median_ms": 41.234, "peak_bytes": 1_234_000_000,
        "tflops": 640.0, "matmul_share": 0.8, "gradient_error": 1.2e-3,
    }  # fmt: skip
    Record(folder / "contrastive.csv", BENCHMARK.columns, BENCHMARK.key).write({**row, **cells})


def test_no_rows_and_rows_of_a_cpu_are_no_figures(tmp_path: Path) -> None:
    assert table.table(tmp_path) == table.NOT_RUN
    _write(tmp_path, device="cpu (x86_64, 2 threads)")
    _write(tmp_path, Case(8192, 512))
    assert table.table(tmp_path) == table.NOT_RUN


def test_a_row_becomes_a_line_with_where_it_is_from(tmp_path: Path) -> None:
    _write(tmp_path)
    _write(tmp_path, provider="memeff", version="0.3.1", error="OOM", median_ms=None)
    text = table.table(tmp_path)
    assert "| fastclip 0.1.0 | 41.2 | 1,234 MB | 640 | 80% | 1.2e-03 |" in text
    assert "| memeff 0.3.1 | OOM | | | |" in text
    assert text.count("NVIDIA H100, torch 2.11.0, triton 3.6.0, commit 0123456789, 2030-01-02") == 1


def test_the_newest_row_counts_and_changed_files_show(tmp_path: Path) -> None:
    _write(tmp_path, commit="new", dirty=True, date="2031-01-01T00:00:00+00:00", median_ms=30.0)
    _write(tmp_path)
    text = table.table(tmp_path)
    assert "| 30 |" in text
    assert "commit new+" in text
    assert "41.2" not in text


def test_the_readme_is_rewritten_between_its_markers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert table.main([*arguments, "--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert table.main(arguments) == 0
    expected = f"before\n{BEGIN}\n{table.NOT_RUN}\n{END}\nafter\n"
    assert readme.read_text() == expected
    assert table.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}"])
def test_missing_markers_are_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert table.main(["--readme", str(readme)]) == 2
    assert BEGIN in capsys.readouterr().err


def test_the_projects_readme_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_block(text, "benchmarks", table.table()) == text


def test_steps_are_given_as_ratios(tmp_path: Path) -> None:
    record = Record(tmp_path / "step.csv", STEP.columns, STEP.key)
    case = StepCase("ViT-B-32", 1000)
    row = {
        "commit": "0123456789abcdef", "dirty": False, "date": "2030-01-02T00:00:00+00:00",
        "device": "cpu", "torch": "2.11.0", **asdict(case),
    }  # fmt: skip
    record.write({**row, "commit": "old", "date": "2029", "provider": "fastclip", "median_ms": 1.0})
    record.write({**row, "provider": "fastclip", "median_ms": 500.0})
    record.write({**row, "provider": "open_clip", "version": "3.3.0", "median_ms": 800.0})
    record.write({**row, "provider": "open_clip-compiled", "version": "3.3.0", "error": "OOM"})
    text = table.table(tmp_path)
    assert "| | fastclip | open_clip 3.3.0 | open_clip-compiled 3.3.0 |" in text
    assert f"| {case} | 2,000/s | 1.6× | OOM |" in text
    assert "commit 0123456789, 2030-01-02" in text
    assert "old" not in text
