"""The data path's tables: decoding, loading, reading, matching, ours over each peer's rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.rows import Row, stamp

OURS = "fastclip"
PARTS = {
    "decode": "JPEG to the 224 × 224 pixels of a crop (one core, processor time)",
    "load": "Training batches of 64 (elapsed time; threads of ours, processes of open_clip's)",
    "gpu": "Training batches of 512 onto the GPU (elapsed time, all cores of its host)",
    "read": "Members out of shards, not decoded (one core, elapsed time)",
}


def section(loader: Sequence[Row], phrases: Sequence[Row]) -> str:
    """Tables of the newest rows; "" without any."""
    tables = [_loader(title, _newest(loader, part)) for part, title in PARTS.items()]
    tables.append(_phrases(phrases))
    return "\n\n".join(table for table in tables if table)


def _newest(rows: Sequence[Row], part: str) -> dict[tuple[str, str], Row]:
    """By provider and case."""
    newest = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if row["part"] == part:
            cores = f", {row['cores']} core(s)" if part in ("load", "gpu") else ""
            newest[row["provider"], row["case"] + cores] = row
    return newest


def _loader(title: str, rows: Mapping[tuple[str, str], Row]) -> str:
    return _table(f"{title}: ours a second", rows, _head, lambda rate: f"{rate:,.0f}/s")


def _table(
    title: str,
    rows: Mapping[tuple[str, str], Row],
    head: Callable[[str, Row], str],
    shown: Callable[[float], str],
) -> str:
    """Our rates by case, and under them how many times they are each peer's; "" without any."""
    cases = [case for name, case in rows if name == OURS and rows[name, case]["per_second"]]
    if not cases:
        return ""
    ours = {case: rows[OURS, case] for case in cases}
    rates = " | ".join(shown(float(row["per_second"])) for row in ours.values())
    lines = [
        f"{title}, then how many times it is each other's rate. {stamp(ours[cases[0]], 'python')}.",
        "",
        f"| | {' | '.join(head(case, row) for case, row in ours.items())} |",
        "|---|" + "---:|" * len(cases),
        f"| fastclip | {rates} |",
    ]
    for provider in dict.fromkeys(name for name, _ in rows if name != OURS):
        cells = [_cell(rows.get((provider, case))) for case in cases]
        if any(cell != "–" for cell in cells):
            row = next(row for (name, _), row in rows.items() if name == provider)
            about = f"{provider} {row['version']}" + (
                f" ({note})" if (note := row.get("note")) else ""
            )
            lines.append(f"| {about} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(case: str, row: Row) -> str:
    return f"{case}, {float(row['kilobytes']):.0f} kB" if row["kilobytes"] else case


def _cell(row: Row | None) -> str:
    if row is None or not row["ours_over_it"]:
        return "–"
    mean = row.get("mean_error")
    error = f" (mean error {float(mean):.2g})" if mean else ""
    return f"{float(row['ours_over_it']):.3g}×{error}"


def _phrases(rows: Sequence[Row]) -> str:
    newest: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        newest[row["provider"], row["corpus"]] = row
    queries = next((int(row["queries"]) for row in newest.values()), 0)
    return _table(
        f"Which of {queries:,} queries occur in captions (one core, processor time): ours in "
        "captions a second",
        newest,
        lambda corpus, row: f"{corpus}, {float(row['bytes']):.0f} B",
        lambda rate: f"{rate / 1e6:.2f} M/s",
    )
