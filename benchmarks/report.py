"""Tables, goals and figures, made of measured rows: ``python -m benchmarks.report [--check]``.

The README gets the tables, ``benchmarks/NOTES.md`` what was asked beside what was measured, and
``docs/`` the figures of what ran on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import data_table, eval_table, goals, loss_table, step_table, tokenizer_table
from benchmarks.blocks import rewrite
from benchmarks.figures import FIGURES
from benchmarks.goal_measures import Rows
from benchmarks.record import RESULTS, ROOT, read_rows

PROGRAM = "python -m benchmarks.report"


def reader(results: Path) -> Rows:
    """Rows by their benchmark's name, from the files of a folder."""
    return lambda name: read_rows(results / f"{name}.csv")


def tables(results: Path = RESULTS) -> str:
    """All tables from the rows in a folder, and references to the figures that they make."""
    rows = reader(results)
    parts = [
        loss_table.section(rows("contrastive"), rows("sigmoid")),
        *(f"![{f.title}](docs/{f.file})" for f in FIGURES if f.drawable(rows)),
        step_table.section(rows("step")),
        data_table.section(rows("loader"), rows("phrases")),
        tokenizer_table.section(rows("tokenizer")),
        eval_table.section(rows("search"), rows("probe")),
    ]
    return "\n\n".join(part for part in parts if part)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; with --check the exit status is 1 where a page is not up to date."""
    parser = argparse.ArgumentParser(prog=PROGRAM)
    add = parser.add_argument
    add("--check", action="store_true", help="write nothing; say whether the pages are new")
    add("--results", type=Path, default=RESULTS, help="folder of the rows")
    add("--readme", type=Path, default=ROOT / "README.md")
    add("--notes", type=Path, default=ROOT / "benchmarks" / "NOTES.md")
    add("--figures", type=Path, default=ROOT / "docs", help="folder of the figures")
    options = parser.parse_args(arguments)
    rows = reader(options.results)
    pages = (
        (options.readme, lambda: {"benchmarks": tables(options.results)}),
        (options.notes, lambda: {"goals": goals.table(rows)}),
    )
    status = max(rewrite(p, make, check=options.check, program=PROGRAM) for p, make in pages)
    if not options.check:
        for figure in FIGURES:
            if figure.drawable(rows):
                figure.draw(rows, options.figures / figure.file)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
