"""The steps' table: our rate in pairs a second, and over each other way how many times it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from benchmarks.rows import Row, stamp
from benchmarks.steps import StepCase

OURS = "fastclip"


def section(rows: Sequence[Row]) -> str:
    """A table for each device, of the newest commit measured there; "" without rows."""
    tables = []
    for device in dict.fromkeys(row["device"] for row in rows):
        there = sorted(
            (row for row in rows if row["device"] == device), key=lambda row: row["date"]
        )
        newest = [row for row in there if row["commit"] == there[-1]["commit"]]
        tables.append(_table(newest))
    return "\n\n".join(tables)


def _table(rows: Sequence[Row]) -> str:
    providers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != OURS]
    first = rows[0]
    versions = {row["provider"]: row["version"] for row in rows}
    heads = [name if name.startswith(OURS) else f"{name} {versions[name]}" for name in providers]
    lines = [
        "Training steps (or a tower's forward and backward): ours in pairs a second, then how many "
        "times it is each other way's rate. `padded` and `all-rows` are ours without one of the "
        "savings each, `unguarded` without the gradient's norm and check, `zero-0` and `zero-1` "
        f"under DeepSpeed instead of the plain engine. {stamp(first, 'torch')}.",
        "",
        "| | fastclip | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * (1 + len(providers)),
    ]
    for case in dict.fromkeys(map(_case, rows)):
        of_case = {row["provider"]: row for row in rows if _case(row) == case}
        if OURS not in of_case or not of_case[OURS]["median_ms"]:
            continue
        ours = float(of_case[OURS]["median_ms"])
        cells = [_cell(of_case.get(name), ours) for name in providers]
        lines.append(f"| {case} | {1e3 * case.batch / ours:,.4g}/s | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _case(row: Row) -> StepCase:
    kinds = {"int": int, "float": float}
    values = {
        field.name: kinds.get(str(field.type), str)(row[field.name]) for field in fields(StepCase)
    }
    return StepCase(**values)  # pyright: ignore[reportArgumentType]


def _cell(row: Row | None, ours: float) -> str:
    if row is None:
        return "–"
    if not row["median_ms"]:
        return "OOM" if row["error"] == "OOM" else "failed"
    return f"{float(row['median_ms']) / ours:.3g}×"
