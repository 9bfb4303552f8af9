"""Tables, goals and figures: from rows, newest first; and whether the pages are up to date."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import goals, loss_table, report
from benchmarks.bench_contrastive import BENCHMARK
from benchmarks.bench_step import BENCHMARK as STEP
from benchmarks.bench_step import FITTING
from benchmarks.blocks import markers, with_block
from benchmarks.cases import CONTRASTIVE_SETS, Case
from benchmarks.record import RESULTS, ROOT, Record
from benchmarks.steps import StepCase

BEGIN, END = markers("benchmarks")
HEADLINE = CONTRASTIVE_SETS["headline"][0]
STAMP = {
    "commit": "0123456789abcdef", "dirty": False, "date": "2030-01-02T00:00:00+00:00",
    "device": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0",
}  # fmt: skip


def _write(folder: Path, case: Case = HEADLINE, **cells: object) -> None:
    row = {
        **STAMP, "provider": "fastclip", "version": "0.1.0", **asdict(case), "median_ms": 41.234,
        "peak_bytes": 1_234_000_000, "tflops": 640.0, "matmul_share": 0.8,
        "gradient_error": 1.2e-3,
    }  # fmt: skip
    Record(folder / "contrastive.csv", BENCHMARK.columns, BENCHMARK.key).write({**row, **cells})


def test_no_rows_and_rows_of_a_cpu_are_no_figures(tmp_path: Path) -> None:
    assert report.tables(tmp_path) == loss_table.NOT_RUN
    _write(tmp_path, device="cpu (x86_64, 2 threads)")
    _write(tmp_path, Case(8192, 512))
    assert report.tables(tmp_path) == loss_table.NOT_RUN


def test_a_row_becomes_a_line_with_where_it_is_from(tmp_path: Path) -> None:
    _write(tmp_path)
    _write(tmp_path, provider="memeff", version="0.3.1", error="OOM", median_ms=None)
    _write(tmp_path, provider="inf-cl", version="1.2", median_ms=165.0)
    _write(tmp_path, provider="open_clip", version="3.3.0", median_ms=165.0, commit="another")
    text = report.tables(tmp_path)
    assert "| fastclip 0.1.0 | 41.2 | 1× | 1,234 MB | 640 | 80% | 1.2e-03 |" in text
    assert "| memeff 0.3.1 | OOM | | | | |" in text
    assert "| inf-cl 1.2 | 165 | 4× |" in text
    assert "| open_clip 3.3.0 | 165 | – |" in text
    assert text.count("NVIDIA H100, torch 2.11.0, triton 3.6.0, commit 0123456789, 2030-01-02") == 1


def test_the_newest_row_counts_and_changed_files_show(tmp_path: Path) -> None:
    _write(tmp_path, commit="new", dirty=True, date="2031-01-01T00:00:00+00:00", median_ms=30.0)
    _write(tmp_path)
    text = report.tables(tmp_path)
    assert "| 30 |" in text
    assert "commit new+" in text
    assert "41.2" not in text


def test_pages_are_rewritten_between_their_markers_and_figures_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, notes = tmp_path / "README.md", tmp_path / "NOTES.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    notes.write_text("\n".join(markers("goals")))
    arguments = ["--readme", str(readme), "--notes", str(notes), "--results", str(tmp_path)]
    arguments += ["--figures", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert capsys.readouterr().out.count("out of date") == 2
    assert report.main(arguments) == 0
    assert readme.read_text() == f"before\n{BEGIN}\n{loss_table.NOT_RUN}\n{END}\nafter\n"
    assert "not measured" in notes.read_text()
    assert report.main([*arguments, "--check"]) == 0
    assert not list(tmp_path.glob("*.png"))

    _write(tmp_path)
    _write(tmp_path, Case(131_072, 768), provider="memeff", error="OOM", median_ms=None)
    record = Record(tmp_path / "step.csv", STEP.columns, STEP.key)
    for provider in ("fastclip", "open_clip"):
        case = asdict(StepCase("ViT-B-32", FITTING["ViT-B-32"]))
        record.write({**STAMP, "provider": provider, **case, "median_ms": 100.0})
    assert report.main(arguments) == 0
    assert "](docs/losses.png)" in readme.read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"losses.png", "steps.png"}


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}"])
def test_missing_markers_are_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.main(["--check", "--readme", str(readme)]) == 2
    assert BEGIN in capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "name"), [("README.md", "benchmarks"), ("benchmarks/NOTES.md", "goals")]
)
def test_the_projects_pages_are_up_to_date(page: str, name: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    made = {"benchmarks": report.tables, "goals": lambda: goals.table(report.reader(RESULTS))}
    assert with_block(text, name, made[name]()) == text


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
    text = report.tables(tmp_path)
    assert "| | fastclip | open_clip 3.3.0 | open_clip-compiled 3.3.0 |" in text
    assert f"| {case} | 2,000/s | 1.6× | OOM |" in text
    assert "commit 0123456789, 2030-01-02" in text
    assert "old" not in text
