"""``fastclip experiment``: what the CLIP paper's figures show, on data and models of one's own."""

from __future__ import annotations

from typing import Any

from fastclip.experiments.objectives import add_objectives_verb
from fastclip.experiments.overlap import add_overlap_verb
from fastclip.experiments.robustness import add_robustness_verb
from fastclip.experiments.scaling import add_scaling_verb


def add_experiment_verbs(verbs: Any) -> None:
    """Add ``experiment`` with its own verbs; nothing heavy is imported before one of them runs."""
    experiment = verbs.add_parser(
        "experiment", help="objectives, scaling, robustness, overlap: the paper's figures"
    )
    kinds = experiment.add_subparsers(required=True, metavar="experiment")
    add_objectives_verb(kinds)
    add_scaling_verb(kinds)
    add_robustness_verb(kinds)
    add_overlap_verb(kinds)
