"""The learning curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastclip.report.drawing import new_figure, save_figure


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's ``metrics.jsonl``; a torn last line is left out.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line before the last is not JSON, or holds something that is no number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: nothing has been logged yet")
    rows = read_lines(path)
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not is_number and value not in ("nan", "inf", "-inf"):
                raise ValueError(f"{path}, line {number}: {name} is a number, not {value!r}")
    return rows


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects with a ``step``, one a line; a torn last line is left out.

    Raises:
        ValueError: a line before the last is not JSON, or a line is no such object.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # being written, or cut by a crash
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{path}, line {number} is no object with a step")
        rows.append(row)
    return rows


def draw_learning_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, logit scale, learning rate and, where there are some, evaluations over steps.

    Args:
        rows: from `read_metrics`.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no training step in `rows`.
    """
    train = [row for row in rows if "loss" in row]
    if not train:
        raise ValueError("no training step has been logged yet")
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    figure = new_figure("the learning curve", 11, 3.2 * (2 if evaluations else 1))
    axes = figure.subplots(2 if evaluations else 1, 3, squeeze=False)
    steps = [row["step"] for row in train]
    for axis, (name, title) in zip(
        axes[0],
        (("loss", "loss"), ("logit_scale", "logit scale"), ("learning_rate", "learning rate")),
        strict=True,
    ):
        axis.plot(steps, [_number(row.get(name)) for row in train], color="tab:blue")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if evaluations:
        _draw_evaluations(axes[1], evaluations)
    save_figure(figure, path, dpi=110)


def _draw_evaluations(axes: Any, rows: list[dict[str, Any]]) -> None:
    wanted = (
        ("zero-shot top-1, %", "zero_shot", "top1"),
        ("text found, R@1, %", "retrieval", "image_to_text_r1"),
        ("image found, R@1, %", "retrieval", "text_to_image_r1"),
    )
    for axis, (title, kind, measure) in zip(axes, wanted, strict=True):
        names = sorted(
            {
                name.split("/")[2]
                for row in rows
                for name in row
                if name.startswith(f"eval/{kind}/") and name.endswith(f"/{measure}")
            }
        )
        for name in names:
            key = f"eval/{kind}/{name}/{measure}"
            points = [(row["step"], 100 * row[key]) for row in rows if key in row]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if names:
            axis.legend(fontsize="small")


def _number(value: float | str | None) -> float:
    # Numbers that are not finite are written as text.
    return float("nan") if value is None else float(value)
