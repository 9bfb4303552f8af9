"""Finding rows of results: by their cells, the newest of each device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Row = Mapping[str, str]


def on_gpu(row: Row) -> bool:
    """Whether a row was measured on a GPU."""
    return not row["device"].startswith("cpu")


def matches(row: Row, cells: Mapping[str, object]) -> bool:
    """Whether a row has these cells; of numbers the value counts, not how it is written."""
    return all(_value(row[name]) == _value(str(value)) for name, value in cells.items())


def newest(rows: Iterable[Row], cells: Mapping[str, object]) -> list[Row]:
    """Of the rows with these cells, the newest of each device."""
    found = (row for row in rows if matches(row, cells))
    return list({row["device"]: row for row in sorted(found, key=lambda row: row["date"])}.values())


def beside(rows: Sequence[Row], row: Row, cells: Mapping[str, object]) -> list[Row]:
    """Rows with these cells that were measured where `row` was: same device, same commit."""
    wanted = {"device": row["device"], "commit": row["commit"], "dirty": row["dirty"], **cells}
    return [other for other in rows if matches(other, wanted)]


def stamp(row: Row, *versions: str) -> str:
    """What a row was measured on; a + marks files that differ from the commit.

    Args:
        versions: which of python, torch, triton; default: the last two.
    """
    commit = row["commit"][:10] + ("+" if row["dirty"] == "True" else "")
    names = {"python": "Python", "torch": "torch", "triton": "triton"}
    shown = [f"{names[name]} {row[name]}" for name in versions or ("torch", "triton") if row[name]]
    return ", ".join([row["device"], *shown, f"commit {commit}", row["date"][:10]])


def _value(text: str) -> float | str:
    """A cell's value: 5 and 5.0 are the same noise."""
    try:
        return float(text)
    except ValueError:
        return text
