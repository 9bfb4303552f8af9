"""The tokenizers' table: our rate, and over each peer's how many times it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.captions import CORPORA
from benchmarks.rows import Row, stamp

OURS = "fastclip"


def section(rows: Sequence[Row]) -> str:
    """A table for each number of threads, from the newest row of each tokenizer; "" without any."""
    tables = []
    for threads in sorted({int(row["threads"]) for row in rows}):
        newest: dict[tuple[str, str], Row] = {}
        for row in sorted(rows, key=lambda row: row["date"]):
            if int(row["threads"]) == threads:
                newest[row["provider"], row["corpus"]] = row
        if any((OURS, corpus) in newest for corpus in CORPORA):
            tables.append(_table(newest, threads))
    return "\n\n".join(tables)


def _table(rows: Mapping[tuple[str, str], Row], threads: int) -> str:
    ours = {corpus: rows[OURS, corpus] for corpus in CORPORA if (OURS, corpus) in rows}
    any_row = next(iter(ours.values()))
    clock = "one thread, processor time" if threads == 1 else f"{threads} threads, elapsed time"
    heads = " | ".join(f"{corpus}, {float(row['bytes']):.0f} B" for corpus, row in ours.items())
    rates = " | ".join(f"{float(row['per_second']) / 1e6:.2f} M/s" for row in ours.values())
    lines = [
        f"Tokenizers, {clock}: ours in captions a second, then how many times it is each other's "
        f"rate (and the share of rows in which that one's ids are not CLIP's). "
        f"{stamp(any_row, 'python')}.",
        "",
        f"| | {heads} |",
        "|---|" + "---:|" * len(ours),
        f"| fastclip | {rates} |",
    ]
    for provider in dict.fromkeys(name for name, _ in rows):
        if not provider.startswith(OURS):
            version = next(row["version"] for (name, _), row in rows.items() if name == provider)
            cells = " | ".join(_cell(rows.get((provider, corpus))) for corpus in ours)
            lines.append(f"| {provider} {version} | {cells} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or not row["ours_over_it"]:
        return "–"
    wrong = float(row["wrong_rows"]) if row["wrong_rows"] else 0.0
    return f"{float(row['ours_over_it']):.3g}×" + (f" ({wrong:.1%})" if wrong else "")
