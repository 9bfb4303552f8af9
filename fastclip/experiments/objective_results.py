"""What the runs of the comparison of objectives amount to: curves, efficiency ratios, tables."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastclip.eval.intervals import t_quantile
from fastclip.experiments.objective_models import OBJECTIVES, Objective
from fastclip.report.objectives_figure import ObjectiveCurve

Rows = Sequence[Mapping[str, Any]]
"""Results of one run, as `train_objective` gives them."""

TITLES: dict[Objective, str] = {
    "transformer_contrastive": "transformer, contrastive (CLIP)",
    "bag_of_words_contrastive": "bag of words, contrastive",
    "convirt": "ConVIRT's variant",
    "bag_of_words": "bag of words, predicted",
    "language_model": "transformer language model",
}
"""As they are called in figure and tables, and in their order."""

COMPARED: tuple[tuple[Objective, Objective, str], ...] = (
    ("bag_of_words", "language_model", "3×"),
    ("bag_of_words_contrastive", "bag_of_words", "4×"),
    ("bag_of_words_contrastive", "language_model", "12×"),
    ("transformer_contrastive", "bag_of_words_contrastive", "none stated"),
    ("transformer_contrastive", "convirt", "none stated"),
)
"""The objective said to be more efficient, the other, and the paper's ratio."""


@dataclass(frozen=True)
class Ratio:
    """By what factor fewer images one objective needs than another.

    ``bound`` says what the number is: "equal" the ratio; "more" that it is more than that, since
    the better one was there at its first evaluation; "less" that it is less than that, since the
    better one never got there.
    """

    value: float
    bound: str

    def __str__(self) -> str:
        return {"equal": "", "more": "more than ", "less": "less than "}[self.bound] + (
            f"{self.value:.1f}×"
        )


def images_to_reach(images: Sequence[int], accuracy: Sequence[float], level: float) -> Ratio:
    """Images after which a curve first has `level`, between its points linear in log(images).

    The `value` is a number of images here: "less" than the first point's ("less"), or "more" than
    the last one's.
    """
    if accuracy[0] >= level:
        return Ratio(images[0], "less" if accuracy[0] > level else "equal")
    points = zip(images, accuracy, strict=True)
    for (before, low), (after, high) in itertools.pairwise(points):
        if high >= level:
            share = (level - low) / (high - low)
            return Ratio(before * (after / before) ** share, "equal")
    return Ratio(images[-1], "more")


def efficiency(images: Sequence[int], better: Sequence[float], other: Sequence[float]) -> Ratio:
    """The images `other` took for its last accuracy, over those `better` needs for the same."""
    needed = images_to_reach(images, better, other[-1])
    opposite = {"equal": "equal", "less": "more", "more": "less"}
    return Ratio(images[-1] / needed.value, opposite[needed.bound])


def bootstrap(
    images: Sequence[int], better: Sequence[Sequence[float]], other: Sequence[Sequence[float]]
) -> tuple[Ratio, Ratio] | None:
    """Least and largest ratio of mean curves within the middle 95 % of all resamples of seeds.

    Seeds are drawn in pairs, since one seed has one order of data and one image tower at the start.
    All resamples are enumerated, so that nothing depends on a generator. None for one seed.
    """
    seeds = len(better)
    if seeds < 2:
        return None
    found = []
    for drawn in itertools.product(range(seeds), repeat=seeds):
        means = [_mean([curves[seed] for seed in drawn]) for curves in (better, other)]
        found.append(efficiency(images, *means))
    # "More than" stands above an equal number, "less than" below it.
    order = {"less": 0, "equal": 1, "more": 2}
    found.sort(key=lambda ratio: (ratio.value, order[ratio.bound]))
    tail = math.floor(0.025 * len(found))
    return found[tail], found[-1 - tail]


def curve(runs: Sequence[Rows], measure: str) -> ObjectiveCurve:
    """Mean of a measure over seeds, with its 95 % interval by Student's t."""
    values = accuracies(runs, measure)
    mean = _mean(values)
    reach = [0.0] * len(mean)
    if len(values) > 1:
        factor = t_quantile(0.95, len(values) - 1) / math.sqrt(len(values))
        reach = [factor * statistics.stdev(point) for point in zip(*values, strict=True)]
    return ObjectiveCurve(
        images=[row["images"] for row in runs[0]],
        mean=mean,
        low=[m - r for m, r in zip(mean, reach, strict=True)],
        high=[m + r for m, r in zip(mean, reach, strict=True)],
    )


def accuracies(runs: Sequence[Rows], measure: str) -> list[list[float]]:
    """The measure at each point of each run."""
    return [[row[measure] for row in rows] for rows in runs]


def ratios(runs: Mapping[Objective, Sequence[Rows]], task: str) -> list[dict[str, Any]]:
    """A row of the table of efficiencies for each of `COMPARED`, by the scores fixed in advance."""
    return [
        _ratio(runs, task, (better, ""), (other, ""), paper) for better, other, paper in COMPARED
    ]


def sensitivity(runs: Mapping[Objective, Sequence[Rows]], task: str) -> list[dict[str, Any]]:
    """The same for every other combination of the two objectives' scores."""
    found = []
    for better, other, paper in COMPARED:
        scores = [["", *variants_of(runs[objective], task)] for objective in (better, other)]
        for one, two in itertools.product(*scores):
            if one or two:
                found.append(_ratio(runs, task, (better, one), (other, two), paper))
    return found


def _ratio(
    runs: Mapping[Objective, Sequence[Rows]],
    task: str,
    better: tuple[Objective, str],
    other: tuple[Objective, str],
    paper: str,
) -> dict[str, Any]:
    """`better` and `other` are objectives with their scores, "" for those fixed in advance."""
    rows = runs[better[0]]
    images = [row["images"] for row in rows[0]]
    pair = (
        accuracies(rows, _measure(task, better[1])),
        accuracies([seed[-1:] for seed in runs[other[0]]], _measure(task, other[1])),
    )
    means = _mean(pair[0]), _mean(pair[1])
    interval = bootstrap(images, *pair)
    return {
        "objective": better[0],
        "score": better[1],
        "over": other[0],
        "over_score": other[1],
        "accuracy": means[1][-1],
        "ratio": str(efficiency(images, *means)),
        "interval": None if interval is None else [str(end) for end in interval],
        "paper": paper,
    }


def format_results(
    runs: Mapping[Objective, Sequence[Rows]], tasks: Sequence[str], headline: str
) -> str:
    """The tables: accuracies at the end, the scores' variants, efficiency at equal accuracy."""
    lines = ["After the last image, top-1 in % (mean over seeds ± half the 95 % interval):", ""]
    lines.append(f"{'':34s}" + "".join(f"{task:>22s}" for task in tasks))
    for objective, title in TITLES.items():
        cells = (_percent(runs[objective], _measure(task, "")) for task in tasks)
        lines.append(f"{title:34s}" + "".join(f"{cell:>22s}" for cell in cells))
    lines += ["", "The same by other scores, which were not chosen:", ""]
    for objective in OBJECTIVES:
        for variant in variants_of(runs[objective], headline):
            cells = (_percent(runs[objective], _measure(task, variant)) for task in tasks)
            name = f"{TITLES[objective]}: {variant}"
            lines.append(f"{name:40s}" + "".join(f"{cell:>20s}" for cell in cells))
    lines += ["", f"Fewer images for the same accuracy ({headline}, that of the other at its end):"]
    lines.append("")
    lines += map(_sentence, ratios(runs, headline))
    lines += ["", "The same by other scores, which were not chosen:", ""]
    lines += map(_sentence, sensitivity(runs, headline))
    return "\n".join(lines)


def _sentence(row: Mapping[str, Any]) -> str:
    names = [
        TITLES[objective] + (f" ({score})" if score else "")
        for objective, score in (
            (row["objective"], row["score"]), (row["over"], row["over_score"])
        )
    ]  # fmt: skip
    between = "one seed, no interval"
    if row["interval"] is not None:
        between = f"95 % of resampled seeds: {row['interval'][0]} to {row['interval'][1]}"
    return (
        f"{names[0]} over {names[1]}: {row['ratio']} at {100 * row['accuracy']:.2f} % "
        f"({between}); paper: {row['paper']}"
    )


def variants_of(runs: Sequence[Rows], headline: str) -> list[str]:
    """Names of the other scores that were evaluated after the last step."""
    names = (name.split("/") for name in runs[0][-1])
    return [parts[1] for parts in names if len(parts) == 3 and parts[::2] == [headline, "top1"]]


def _measure(task: str, score: str) -> str:
    return f"{task}/{score}/top1" if score else f"{task}/top1"


def _percent(runs: Sequence[Rows], measure: str) -> str:
    last = curve([rows[-1:] for rows in runs], measure)
    text = f"{100 * last.mean[0]:.2f}"
    return text if len(runs) < 2 else f"{text} ± {100 * (last.high[0] - last.mean[0]):.2f}"


def _mean(values: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(point) for point in zip(*values, strict=True)]
