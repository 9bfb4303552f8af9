"""The results of `run_benchmark` as text."""

from __future__ import annotations

from collections.abc import Sequence

from fastclip.eval.benchmark import Row
from fastclip.eval.retrieval import RECALL_HEADS, recall_cells
from fastclip.eval.table import columns


def format_rows(rows: Sequence[Row], preset: str | None) -> str:
    """The results as tables in per cent, the paper's beside them, and what to know of them.

    "≠ data", "≠ scale", "≠ measure", "≠ prompt" mark numbers of the paper that are of something
    else, – what was not measured or is not known.
    """
    captioned = [row for row in rows if row.retrieval is not None]
    blocks = []
    if labelled := [row for row in rows if row.retrieval is None]:
        blocks.append(_labelled(labelled, preset))
    if captioned:
        blocks.append(_captioned(captioned, preset))
    lines = [f"{row.dataset}: {differs}" for row in rows for differs in _all_differences(row)]
    lines += [
        f"{row.dataset}: {row.left_out:,} of the test split left out"
        for row in rows
        if row.left_out
    ]
    lines += [f"{row.dataset} failed: {failure}" for row in rows for failure in row.failures]
    if any(row.paper is not None or row.paper_retrieval is not None for row in rows):
        lines.append(
            "The paper's numbers (arXiv 2103.00020, Tables 10, 11 and 13) are of its own training "
            "data and, except on ImageNet, its own prompts."
        )
    return "\n".join(["\n\n".join(blocks), *lines])


def _labelled(rows: Sequence[Row], preset: str | None) -> str:
    shots = sorted({k for row in rows for k in row.few_shot or ()})
    heads = ["data set", "images", "classes", "measure", "zero-shot", "95 %", "top-5"]
    heads += ["probe", *(f"{k}-shot" for k in shots)]
    if preset is not None:
        heads += [f"{preset}: zero-shot", "", "probe", ""]
    table = [heads]
    for row in rows:
        zero, probe = row.zero_shot, row.linear_probe
        cells = [
            row.dataset,
            f"{row.images:,}" if row.images else "–",
            f"{row.classes:,}" if row.classes else "–",
            row.metric or "–",
            _per_cent(None if zero is None else zero.value),
            "–" if zero is None else f"{100 * zero.low:.1f}–{100 * zero.high:.1f}",
            _per_cent(row.top5),
            _per_cent(None if probe is None else probe.value),
            *(_per_cent(row.few_shot[k].mean if row.few_shot else None) for k in shots),
        ]
        if preset is not None:
            paper = row.paper
            cells += [
                _per_cent(None if paper is None else paper.zero_shot),
                _marks(row.zero_shot_differs),
                _per_cent(None if paper is None else paper.linear_probe),
                _marks(row.linear_probe_differs) if probe is not None else "",
            ]
        table.append(cells)
    return columns(table)


def _captioned(rows: Sequence[Row], preset: str | None) -> str:
    """Texts found for images, and images for texts; the paper's below."""
    table: list[Sequence[str]] = [["data set", "captions", *RECALL_HEADS, ""]]
    for row in rows:
        for name, numbers in (row.retrieval or {}).items():
            table.append([row.dataset, name, *recall_cells(numbers), ""])
        if not row.retrieval:
            table.append([row.dataset, *("–" for _ in table[0][1:-1]), ""])
        if row.paper_retrieval is not None:
            cells = recall_cells(row.paper_retrieval)
            table.append([row.dataset, str(preset), *cells, _marks(row.retrieval_differs)])
    return columns(table)


def _all_differences(row: Row) -> list[str]:
    probe = row.linear_probe_differs if row.linear_probe is not None else ()
    return list(dict.fromkeys((*row.zero_shot_differs, *probe, *row.retrieval_differs)))


def _marks(differs: Sequence[str]) -> str:
    kinds = dict.fromkeys(each.partition(":")[0] for each in differs)
    return "≠ " + ", ".join(kinds) if kinds else ""


def _per_cent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def summary(rows: Sequence[Row]) -> str:
    """One line: how many data sets, their mean, how many failed."""
    values = [row.zero_shot.value for row in rows if row.zero_shot is not None]
    failed = sum(bool(row.failures) for row in rows)
    mean = f", zero-shot {sum(values) / len(values):.1%} on average" if values else ""
    return f"{len(rows)} data set(s){mean}, {failed} failed"
