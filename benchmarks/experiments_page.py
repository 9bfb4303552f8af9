"""docs/experiments.md's tables, from results: ``python -m benchmarks.experiments_page [--check]``.

``benchmarks/results/experiments`` has what ``fastclip eval --datasets`` and ``fastclip experiment``
wrote: of each result its text as ``NAME.txt``, its numbers as ``NAME.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.blocks import rewrite
from benchmarks.record import RESULTS, ROOT

PAGE = ROOT / "docs" / "experiments.md"
EXPERIMENTS = RESULTS / "experiments"
PROGRAM = "python -m benchmarks.experiments_page"


def blocks(folder: Path = EXPERIMENTS) -> dict[str, str]:
    """The page's block of each result, by name.

    Raises:
        FileNotFoundError: a text has no numbers beside it.
        KeyError: the numbers do not say where they are from.
    """
    return {
        text.stem: "\n".join(
            [
                _stamp(json.loads(text.with_suffix(".json").read_bytes())["provenance"]),
                "",
                "```text",
                text.read_text(encoding="utf-8").rstrip(),
                "```",
            ]
        )
        for text in sorted(folder.glob("*.txt"))
    }


def _stamp(provenance: Mapping[str, Any]) -> str:
    versions = provenance["versions"]
    return (
        f"{provenance['machine']}, Python {versions['python']}, torch {versions['torch']}, commit "
        f"{_short(provenance['commit'])}, {provenance['date'][:10]}."
    )


def _short(commit: str | None) -> str:
    """A + marks files that differ from the commit."""
    return "unknown" if commit is None else commit[:10] + "+" * commit.endswith("+")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; with --check the exit status is 1 where the page is not up to date."""
    parser = argparse.ArgumentParser(prog=PROGRAM)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether it is new")
    parser.add_argument("--results", type=Path, default=EXPERIMENTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    return rewrite(options.page, blocks(options.results), check=options.check, program=PROGRAM)


if __name__ == "__main__":
    raise SystemExit(main())
