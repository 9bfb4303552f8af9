"""``fastclip experiment scaling``: zero-shot error against compute (arXiv 2103.00020, Figure 9)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_scaling_verb(subparsers: Any) -> None:
    """Add ``scaling``; `subparsers` is what argparse's `add_subparsers` gives."""
    scaling = subparsers.add_parser(
        "scaling", help="train a family of models and fit their errors over compute"
    )
    scaling.add_argument("--data", type=Path, required=True, help="what `fastclip data demo` wrote")
    scaling.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    scaling.add_argument(
        "--preset",
        choices=("small", "long"),
        default="small",
        help="on two cores: 20 minutes, or 70",
    )
    scaling.add_argument("--seeds", type=int, help="trainings of each model; default: the preset's")
    scaling.add_argument("--images", type=int, help="that each model sees; default: the preset's")
    scaling.set_defaults(run=_scaling)


def _scaling(options: argparse.Namespace) -> int:
    from fastclip.experiments.scaling_family import PRESETS, base_config, family, group_task
    from fastclip.experiments.scaling_report import format_report, run_scaling

    preset = PRESETS[options.preset]
    base = base_config(options.data)
    images = preset.images if options.images is None else options.images
    fewest = 10 * base.run.global_batch_size
    if images < fewest:
        raise ValueError(f"--images is at least {fewest:,}, ten steps, not {images:,}")
    members = family(preset, options.seeds)
    measured, fits = run_scaling(
        members, base, options.out, images=images, groups=group_task(options.data)
    )
    print(format_report(measured, fits))
    print(f"\n{options.out}: scaling.json, .txt, .png and .svg")
    return 0
