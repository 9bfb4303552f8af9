"""The curves of a run's report, out of the lines of its ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastclip.report.figures import line_chart
from fastclip.report.page import Figure

_Row = dict[str, Any]


def training_curves(rows: Sequence[_Row]) -> list[Figure]:
    """Loss, logit scale, learning rate and the gradient's norm over steps."""
    return _curves(
        rows,
        (
            ("Loss", "loss", 1.0, False),
            ("Logit scale", "logit_scale", 1.0, False),
            ("Learning rate", "learning_rate", 1.0, True),
            ("Norm of the gradient", "gradient_norm", 1.0, True),
        ),
    )


def speed_curves(rows: Sequence[_Row]) -> list[Figure]:
    """Throughput, waiting, utilisation and memory over steps."""
    return _curves(
        rows,
        (
            ("Pairs per second", "samples_per_second", 1.0, True),
            ("Waiting for data, % of the time", "data_wait", 100.0, True),
            ("Model FLOPs utilisation, %", "mfu", 100.0, True),
            ("Peak memory, GiB", "memory_gib", 1.0, True),
        ),
    )


def evaluation_curves(rows: Sequence[_Row]) -> list[Figure]:
    """Zero-shot accuracy and recall over steps, where they were evaluated more than once."""
    figures = []
    for title, kind, measure in (
        ("Zero-shot top-1, %", "zero_shot", "top1"),
        ("Text found for an image, R@1, %", "retrieval", "image_to_text_r1"),
        ("Image found for a text, R@1, %", "retrieval", "text_to_image_r1"),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for name, value in row.items():
                parts = name.split("/")
                if parts[:2] == ["eval", kind] and parts[-1] == measure:
                    lines.setdefault(parts[2], []).append((row["step"], 100 * float(value)))
        if any(len(points) > 1 for points in lines.values()):
            chart = line_chart(lines, title=title, x="step", from_zero=True, marked=True)
            figures.append(Figure(title, chart))
    return figures


def _curves(rows: Sequence[_Row], wanted: Sequence[tuple[str, str, float, bool]]) -> list[Figure]:
    figures = []
    for title, name, unit, from_zero in wanted:
        points = _points(rows, name, lambda value, unit=unit: unit * value)
        if any(math.isfinite(value) for _, value in points):
            chart = line_chart({title: points}, title=title, x="step", from_zero=from_zero)
            figures.append(Figure(title, chart))
    return figures


def _points(
    rows: Sequence[_Row], name: str, scaled: Callable[[float], float]
) -> list[tuple[float, float]]:
    return [
        (row["step"], scaled(float(row[name])))  # "nan" and "inf" are written as text
        for row in rows
        if row.get(name) is not None
    ]
