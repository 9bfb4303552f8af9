"""The data path's tables: decoding, loading, reading, matching, ours over each peer's rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Row = Mapping[str, str]
OURS = "fastclip"
PARTS = {
    "decode": "JPEG to the 224 × 224 pixels of a crop (one core, processor time)",
    "load": "Training batches of 64 (elapsed time; threads of ours, processes of open_clip's)",
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
            cores = f", {row['cores']} core(s)" if part == "load" else ""
            newest[row["provider"], row["case"] + cores] = row
    return newest


def _loader(title: str, rows: Mapping[tuple[str, str], Row]) -> str:
    cases = [case for name, case in rows if name == OURS and rows[name, case]["per_second"]]
    if not cases:
        return ""
    ours = {case: rows[OURS, case] for case in cases}
    rates = " | ".join(f"{float(row['per_second']):,.0f}/s" for row in ours.values())
    lines = [
        f"{title}: ours a second, then how many times it is each other's rate. "
        f"{_stamp(next(iter(ours.values())))}",
        "",
        f"| | {' | '.join(_head(case, row) for case, row in ours.items())} |",
        "|---|" + "---:|" * len(cases),
        f"| fastclip | {rates} |",
    ]
    for provider in dict.fromkeys(name for name, _ in rows if name != OURS):
        cells = [_cell(rows.get((provider, case))) for case in cases]
        if any(cell != "–" for cell in cells):
            row = next(row for (name, _), row in rows.items() if name == provider)
            note = f" ({row['note']})" if row["note"] else ""
            lines.append(f"| {provider} {row['version']}{note} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(case: str, row: Row) -> str:
    return f"{case}, {float(row['kilobytes']):.0f} kB" if row["kilobytes"] else case


def _cell(row: Row | None) -> str:
    if row is None or not row["ours_over_it"]:
        return "–"
    error = f" (mean error {float(row['mean_error']):.2g})" if row["mean_error"] else ""
    return f"{float(row['ours_over_it']):.3g}×{error}"


def _phrases(rows: Sequence[Row]) -> str:
    newest: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        newest[row["provider"], row["corpus"]] = row
    corpora = [corpus for name, corpus in newest if name == OURS]
    if not corpora:
        return ""
    first = newest[OURS, corpora[0]]
    heads = " | ".join(f"{c}, {float(newest[OURS, c]['bytes']):.0f} B" for c in corpora)
    rates = " | ".join(f"{float(newest[OURS, c]['per_second']) / 1e6:.2f} M/s" for c in corpora)
    lines = [
        f"Which of {int(first['queries']):,} queries occur in captions (one core, processor time): "
        f"ours in captions a second, then how many times it is each other's rate. {_stamp(first)}",
        "",
        f"| | {heads} |",
        "|---|" + "---:|" * len(corpora),
        f"| fastclip | {rates} |",
    ]
    for provider in dict.fromkeys(name for name, _ in newest if name != OURS):
        cells = " | ".join(_cell_of(newest.get((provider, corpus))) for corpus in corpora)
        version = next(row["version"] for (name, _), row in newest.items() if name == provider)
        lines.append(f"| {provider} {version} | {cells} |")
    return "\n".join(lines)


def _cell_of(row: Row | None) -> str:
    return "–" if row is None or not row["ours_over_it"] else f"{float(row['ours_over_it']):.3g}×"


def _stamp(row: Row) -> str:
    commit = row["commit"][:10] + ("+" if row["dirty"] == "True" else "")
    return f"{row['device']}, Python {row['python']}, commit {commit}, {row['date'][:10]}."
