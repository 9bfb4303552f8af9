"""Tables of search and of linear probes: ours, then how many times it takes each other's time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Row = Mapping[str, str]
OURS = "fastclip"


def section(search: Sequence[Row], probe: Sequence[Row]) -> str:
    """Tables of the newest rows; "" without any."""
    return "\n\n".join(
        [
            *_tables(search, ("count", "dim", "jitter", "k"), _search),
            *_tables(probe, ("images", "width", "classes"), _probe),
        ]
    )


def _tables(
    rows: Sequence[Row], case: Sequence[str], table: Callable[[Sequence[Row]], str]
) -> list[str]:
    """One for each case of which we have a measured row, ours first."""
    newest: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        newest.setdefault(tuple(row[name] for name in case), {})[row["provider"]] = row
    return [
        table([found[OURS], *(row for name, row in found.items() if name != OURS)])
        for found in newest.values()
        if OURS in found and not found[OURS]["error"]
    ]


def _search(rows: Sequence[Row]) -> str:
    ours = rows[0]
    lines = [
        f"The {ours['k']} nearest of {int(ours['count']):,} features of width {ours['dim']}, one "
        f"query at a time: ours in milliseconds, then how many times that is each other's time. "
        f"{_stamp(ours)}",
        "",
        "| | time | recall, images | recall, texts | build | memory, building | searching |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row["error"].split(":")[0], "", "", "", "", ""]
        if not row["error"]:
            cells = [
                _time(row, ours, lambda ms: f"{ms:.3g} ms"),
                *(f"{float(row[f'recall_{kind}']):.3f}" for kind in ("images", "texts")),
                f"{float(row['build_s']):,.0f} s",
                *(f"{float(row[name]) / 1e3:.2f} GB" for name in ("build_rss_mb", "rss_mb")),
            ]
        lines.append(f"| {row['provider']} {row['version']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _probe(rows: Sequence[Row]) -> str:
    ours = rows[0]
    lines = [
        f"A linear probe with its search, {int(ours['images']):,} images × {ours['width']}, "
        f"{ours['classes']} classes: ours in seconds, then how many times that is each other's "
        f"time. {_stamp(ours)}",
        "",
        "| | time | accuracy | strength chosen |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row["error"].split(":")[0], "", ""]
        if not row["error"]:
            cells = [
                _time(row, ours, lambda ms: f"{ms / 1e3:.3g} s"),
                f"{float(row['accuracy']):.2%}",
                f"{float(row['strength']):.2g}",
            ]
        lines.append(f"| {row['provider']} {row['version']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(row: Row, ours: Row, shown: Callable[[float], str]) -> str:
    taken = float(row["median_ms"])
    return shown(taken) if row is ours else f"{taken / float(ours['median_ms']):.3g}×"


def _stamp(row: Row) -> str:
    commit = row["commit"][:10] + ("+" if row["dirty"] == "True" else "")
    return (
        f"{row['device']}, Python {row['python']}, torch {row['torch']}, commit {commit}, "
        f"{row['date'][:10]}."
    )
