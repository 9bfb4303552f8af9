"""Tables of search and of linear probes: ours, then how many times it takes each other's time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Row = Mapping[str, str]
OURS = "fastclip"

_SAME_RUN = ("device", "commit", "dirty")


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
    """One for each case and device: our newest measured row, and its peers' of the same commit."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if row["provider"] == OURS and not row["error"]:
            newest[(row["device"], *(row[name] for name in case))] = row
    tables = []
    for ours in newest.values():
        same = [row for row in rows if all(row[name] == ours[name] for name in (*_SAME_RUN, *case))]
        peers = {row["provider"]: row for row in same if row["provider"] != OURS}
        tables.append(table([ours, *peers.values()]))
    return tables


def _search(rows: Sequence[Row]) -> str:
    ours = rows[0]
    lines = [
        f"The {ours['k']} nearest of {int(ours['count']):,} features of width {ours['dim']} "
        f"(jitter {ours['jitter']}), one query at a time: ours in milliseconds, then how many "
        f"times that is each other's time. {_stamp(ours)}",
        "",
        "| | time | recall, images | recall, texts | build | memory, building | searching |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            _time(row, ours, lambda ms: f"{ms:.3g} ms"),
            *(_number(row[f"recall_{kind}"], "{:.3f}") for kind in ("images", "texts")),
            _number(row["build_s"], "{:,.0f} s"),
            *(_number(row[name], "{:.2f} GB", 1e-3) for name in ("build_rss_mb", "rss_mb")),
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
        cells = [
            _time(row, ours, lambda ms: f"{ms / 1e3:.3g} s"),
            _number(row["accuracy"], "{:.2%}"),
            _number(row["strength"], "{:.2g}"),
        ]
        lines.append(f"| {row['provider']} {row['version']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(row: Row, ours: Row, shown: Callable[[float], str]) -> str:
    if row["error"]:
        return row["error"].split(":")[0].replace("|", "/")
    taken = float(row["median_ms"])
    return shown(taken) if row is ours else f"{taken / float(ours['median_ms']):.3g}×"


def _number(cell: str, pattern: str, factor: float = 1.0) -> str:
    return pattern.format(float(cell) * factor) if cell else "–"


def _stamp(row: Row) -> str:
    commit = row["commit"][:10] + ("+" if row["dirty"] == "True" else "")
    return (
        f"{row['device']}, Python {row['python']}, torch {row['torch']}, commit {commit}, "
        f"{row['date'][:10]}."
    )
