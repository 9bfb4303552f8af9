"""docs/experiments.md's tables, from results: ``python -m benchmarks.experiments_page [--check]``.

``benchmarks/results/experiments`` has what ``fastclip experiment`` wrote, ``NAME.txt`` and
``NAME.json``, and what ``fastclip eval --datasets --json NAME.json > NAME.txt`` did.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.blocks import fenced, rewrite
from benchmarks.record import RESULTS, ROOT
from fastclip.provenance import short

PAGE = ROOT / "docs" / "experiments.md"
EXPERIMENTS = RESULTS / "experiments"
PROGRAM = "python -m benchmarks.experiments_page"


def blocks(folder: Path = EXPERIMENTS) -> dict[str, str]:
    """The page's block of each result, by name.

    Raises:
        FileNotFoundError: there is no result, or one has no numbers beside its text.
        ValueError: the numbers do not say where they are from.
    """
    found = {
        path.stem: f"{_stamp(path.with_suffix('.json'))}\n\n"
        + fenced(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.txt"))
    }
    if not found:
        raise FileNotFoundError(f"{folder} has no result, NAME.txt and NAME.json")
    return found


def _stamp(path: Path) -> str:
    """Where the numbers of a result are from."""
    try:
        content = json.loads(path.read_bytes())
        about, trained = content["provenance"], content.get("trained_at", [])
        versions = about["versions"]
        text = (
            f"{about['machine']}, Python {versions['python']}, torch {versions['torch']}, commit "
            f"{short(about['commit'])}, {about['date'][:10]}."
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say where it is from: {error!r}") from None
    if trained and trained != [about["commit"]]:
        text += f" Its models were trained at {', '.join(map(short, trained))}."
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; with --check the exit status is 1 where the page is not up to date."""
    parser = argparse.ArgumentParser(prog=PROGRAM)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether it is new")
    parser.add_argument("--results", type=Path, default=EXPERIMENTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    return rewrite(
        options.page, lambda: blocks(options.results), check=options.check, program=PROGRAM
    )


if __name__ == "__main__":
    raise SystemExit(main())
