"""Tables of search and of linear probes: ours, then how many times it takes each other's time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.rows import Row, beside, stamp

OURS = "fastclip"


def section(search: Sequence[Row], probe: Sequence[Row]) -> str:
    """Tables of the newest rows; "" without any."""
    found = _tables(
        search,
        ("count", "dim", "jitter", "k"),
        lambda row: (
            f"The {row['k']} nearest of {int(row['count']):,} features of width {row['dim']} "
            f"(jitter {row['jitter']}), one query at a time"
        ),
        {
            "recall, images": _number("recall_images", "{:.3f}"),
            "recall, texts": _number("recall_texts", "{:.3f}"),
            "build": _number("build_s", "{:,.0f} s"),
            "memory, building": _number("build_rss_mb", "{:.2f} GB", 1e-3),
            "searching": _number("rss_mb", "{:.2f} GB", 1e-3),
        },
        lambda ms: f"{ms:.3g} ms",
    )
    probes = _tables(
        probe,
        ("images", "width", "classes"),
        lambda row: (
            f"A linear probe with its search, {int(row['images']):,} images × {row['width']}, "
            f"{row['classes']} classes"
        ),
        {
            "accuracy": _number("accuracy", "{:.2%}"),
            "strength chosen": _number("strength", "{:.2g}"),
        },
        lambda ms: f"{ms / 1e3:.3g} s",
    )
    return "\n\n".join([*found, *probes])


def _tables(
    rows: Sequence[Row],
    case: Sequence[str],
    head: Callable[[Row], str],
    columns: Mapping[str, Callable[[Row], str]],
    shown: Callable[[float], str],
) -> list[str]:
    """One for each case and device: our newest measured row, and its peers' of the same commit.

    Args:
        head: what was measured, from our row.
        columns: beside that of times, their heads and cells.
        shown: our time, from milliseconds.
    """
    newest: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if row["provider"] == OURS and not row["error"]:
            newest[(row["device"], *(row[name] for name in case))] = row
    tables = []
    for ours in newest.values():
        same = beside(rows, ours, {name: ours[name] for name in case})
        peers = {row["provider"]: row for row in same if row["provider"] != OURS}
        lines = [
            f"{head(ours)}: ours, then how many times that is each other's time. "
            f"{stamp(ours, 'python', 'torch')}.",
            "",
            f"| | time | {' | '.join(columns)} |",
            "|---|---:|" + "---:|" * len(columns),
        ]
        for row in (ours, *peers.values()):
            cells = [_time(row, ours, shown), *(cell(row) for cell in columns.values())]
            lines.append(f"| {row['provider']} {row['version']} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return tables


def _time(row: Row, ours: Row, shown: Callable[[float], str]) -> str:
    if row["error"]:
        return row["error"].split(":")[0].replace("|", "/")
    taken = float(row["median_ms"])
    return shown(taken) if row is ours else f"{taken / float(ours['median_ms']):.3g}×"


def _number(name: str, pattern: str, factor: float = 1.0) -> Callable[[Row], str]:
    """A column's cell as it is shown; "–" where a row has none."""
    return lambda row: pattern.format(float(row[name]) * factor) if row[name] else "–"
