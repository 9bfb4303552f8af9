"""The command line's verbs around what a trained model can do: eval, show, report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_eval_verbs(verbs: Any) -> None:
    """Add ``eval``, ``show``, ``report``; `verbs` is what argparse's `add_subparsers` gives."""
    evaluate = verbs.add_parser("eval", help="evaluate a run or a checkpoint")
    evaluate.add_argument(
        "path", type=Path, nargs="?", help="a run's folder, or one of its checkpoints"
    )
    evaluate.add_argument(
        "--datasets", type=Path, metavar="ROOT", help="data sets below this folder"
    )
    evaluate.add_argument(
        "--list-datasets",
        action="store_true",
        help="the paper's data sets, and their layout",
    )
    evaluate.add_argument("--only", type=_names, metavar="NAME,...", help="of the data sets")
    evaluate.add_argument("--linear-probe", action="store_true", help="on each data set, too")
    evaluate.add_argument(
        "--few-shot", action="store_true", help="probes of 1 to 16 images of each class, too"
    )
    evaluate.add_argument("--figure", type=Path, help="draw few-shot beside zero-shot to this file")
    evaluate.add_argument("--preset", help="the paper's model to set beside, e.g. ViT-B-32")
    evaluate.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    evaluate.add_argument("--json", type=Path, help="write the numbers to this file, too")
    evaluate.add_argument("overrides", nargs="*", metavar="eval.field=value")
    evaluate.set_defaults(run=_eval)

    show = verbs.add_parser("show", help="draw a run: contact sheet and learning curve")
    show.add_argument("path", type=Path, help="a run's folder")
    show.set_defaults(run=_show)

    report = verbs.add_parser("report", help="one HTML file about a run: curves, mistakes, finds")
    report.add_argument("path", type=Path, help="a run's folder, or one of its checkpoints")
    report.add_argument("--out", type=Path, help="the file; report.html in the run's folder")
    report.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    report.add_argument("overrides", nargs="*", metavar="eval.field=value")
    report.set_defaults(run=_report)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _eval(options: argparse.Namespace) -> int:
    import json

    if options.list_datasets:
        from fastclip.eval.datasets import format_datasets

        print(format_datasets())
        return 0
    if options.path is None:
        raise ValueError("fastclip eval needs a run's folder, or one of its checkpoints")
    if options.datasets is not None:
        return _eval_datasets(options)
    for name in ("only", "linear_probe", "few_shot", "figure", "preset"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} goes with --datasets ROOT")
    from fastclip.data.rewriting import check_target, write_text
    from fastclip.eval.suite import format_table
    from fastclip.evaluate import evaluate

    if options.json is not None:
        check_target(options.json)
    metrics, is_main = evaluate(options.path, options.overrides, device=options.device)
    if is_main:
        if options.json is not None:
            write_text(options.json, json.dumps(metrics, indent=2) + "\n")
        print(format_table(metrics))
    return 0


def _eval_datasets(options: argparse.Namespace) -> int:
    from fastclip.benchmark_run import evaluate_datasets
    from fastclip.data.rewriting import check_target
    from fastclip.eval.benchmark import SHOTS, Protocol

    if options.figure is not None and not options.few_shot:
        raise ValueError("--figure draws what --few-shot measures: give both")
    if options.json is not None:
        check_target(options.json)
    if options.figure is not None:
        check_target(options.figure, ".png", ".svg")
    found = evaluate_datasets(
        options.path,
        options.datasets,
        only=options.only,
        protocol=Protocol(
            linear_probe=options.linear_probe, shots=SHOTS if options.few_shot else ()
        ),
        preset=options.preset,
        overrides=options.overrides,
        device=options.device,
        results=options.json,
    )
    if found.is_main:
        print(found.table())
        if options.figure is not None:
            found.draw_few_shot(options.figure)
    return int(found.failed)


def _show(options: argparse.Namespace) -> int:
    from fastclip.evaluate import show

    for line in show(options.path):
        print(line)
    return 0


def _report(options: argparse.Namespace) -> int:
    from fastclip.run_report import write_report

    print(write_report(options.path, options.out, options.overrides, device=options.device))
    return 0
