"""The README's table, made of measured rows: ``python -m benchmarks.table [--check]``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import data_table, eval_table, step_table, tokenizer_table
from benchmarks.blocks import rewrite
from benchmarks.cases import CONTRASTIVE_SETS, SIGMOID_SETS, Case
from benchmarks.record import RESULTS, ROOT, read_rows

PROGRAM = "python -m benchmarks.table"
NOT_RUN = "The losses' and similarity's kernels: not yet run on a GPU."
SECTIONS = (
    ("contrastive", "Softmax loss, TFLOP/s counted in 4u", CONTRASTIVE_SETS["headline"]),
    ("sigmoid", "Sigmoid loss, TFLOP/s counted in 3u", SIGMOID_SETS["headline"]),
)
HEADER = (
    "| case | | ms | extra memory | TFLOP/s | of matmul | gradient error |\n"
    "|---|---|---:|---:|---:|---:|---:|"
)

Row = Mapping[str, str]


def section(title: str, rows: Sequence[Row], cases: Sequence[Case]) -> str:
    """A loss's table: its newest row per case, provider and GPU; "" without any."""
    lines = []
    stamps: dict[str, None] = {}
    for case in cases:
        wanted = {name: str(value) for name, value in asdict(case).items()}
        newest = {
            (row["device"], row["provider"]): row
            for row in sorted(rows, key=lambda row: row["date"])
            if not row["device"].startswith("cpu") and _of_case(row, wanted)
        }
        for row in newest.values():
            lines.append(f"| {case} | {row['provider']} {row['version']} | {_cells(row)} |")
            stamps[_stamp(row)] = None
    if not lines:
        return ""
    return "\n".join([f"{title}. {'; '.join(stamps)}.", "", HEADER, *lines])


def table(results: Path = RESULTS) -> str:
    """All sections from the rows in a folder; where none is a GPU's, that it is so."""
    parts = [section(title, read_rows(results / f"{n}.csv"), c) for n, title, c in SECTIONS]
    measured = "\n\n".join(part for part in parts if part) or NOT_RUN
    steps = step_table.section(read_rows(results / "step.csv"))
    tokenizers = tokenizer_table.section(read_rows(results / "tokenizer.csv"))
    data = data_table.section(read_rows(results / "loader.csv"), read_rows(results / "phrases.csv"))
    finding = eval_table.section(
        read_rows(results / "search.csv"), read_rows(results / "probe.csv")
    )
    return "\n\n".join(part for part in (measured, steps, data, tokenizers, finding) if part)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; with --check the exit status is 1 where the README is not up to date."""
    parser = argparse.ArgumentParser(prog=PROGRAM)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether it is new")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    return rewrite(
        options.readme,
        lambda: {"benchmarks": table(options.results)},
        check=options.check,
        program=PROGRAM,
    )


def _of_case(row: Row, case: Mapping[str, str]) -> bool:
    return all(_number(row[name]) == _number(value) for name, value in case.items())


def _number(text: str) -> float | str:
    """A cell's value: 5 and 5.0 are the same noise."""
    try:
        return float(text)
    except ValueError:
        return text


def _cells(row: Row) -> str:
    if row["error"]:
        return f"{row['error'].split(':')[0]} | | | | "
    peak = f"{float(row['peak_bytes']) / 1e6:,.0f} MB" if row["peak_bytes"] else "–"
    share = f"{float(row['matmul_share']):.0%}" if row["matmul_share"] else "–"
    error = f"{float(row['gradient_error']):.1e}" if row["gradient_error"] else "–"
    median, tflops = float(row["median_ms"]), float(row["tflops"])
    return f"{median:.3g} | {peak} | {tflops:.0f} | {share} | {error}"


def _stamp(row: Row) -> str:
    """On what a row was measured; a + marks files that differ from the commit."""
    commit = row["commit"][:10] + ("+" if row["dirty"] == "True" else "")
    return (
        f"{row['device']}, torch {row['torch']}, triton {row['triton']}, commit {commit}, "
        f"{row['date'][:10]}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
