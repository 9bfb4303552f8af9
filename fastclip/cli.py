"""The command line: verbs, each a thin call. Settings are fields of the config, never flags.

Every import of a part happens inside its verb, so that `fastclip doctor` works in any environment.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastclip import __version__
from fastclip.cli_data import add_data_verbs
from fastclip.cli_eval import add_eval_verbs
from fastclip.cli_experiment import add_experiment_verbs
from fastclip.cli_search import add_search_verbs
from fastclip.distributed import launcher
from fastclip.printing import printable_lines

if TYPE_CHECKING:
    from fastclip.recipes import Recipe

logger = logging.getLogger("fastclip")

EXIT_STOPPED = 75
"""Exit status of a run that a signal stopped with its state saved (EX_TEMPFAIL: run it again)."""


def run() -> NoReturn:
    """The process: one verb, then `leave` with its status."""
    leave(main())


def leave(status: int) -> NoReturn:
    """End this process; one that a launcher started leaves without tearing the interpreter down.

    DeepSpeed's globals, and default arguments inside torch.distributed, keep gloo's process group
    alive after it was destroyed. Its threads then free tensors while the interpreter ends, and now
    and then abort a rank whose work is done: the launcher would report a failed run.
    """
    if launcher.launched():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. Errors a user can mend are one line on stderr."""
    options = parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that it lacks must not cost the rest
            stream.reconfigure(errors="replace")
    _configure_logging()
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("fastclip: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as e:
        if os.environ.get("FASTCLIP_TRACEBACK"):
            raise
        print(f"fastclip: error: {printable_lines(str(e))}", file=sys.stderr)
        print("(FASTCLIP_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; overrides may stand before, between and after the options."""
    parser = build_parser()
    options, others = parser.parse_known_args(arguments)
    # argparse gives a list of positional arguments up at the first option that follows it.
    unknown = [word for word in others if word.startswith("-") or "=" not in word]
    if unknown or (others and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or others)}")
    if others:
        options.overrides = [*options.overrides, *others]
    return options


def build_parser() -> argparse.ArgumentParser:
    """The verbs and their few arguments."""
    parser = argparse.ArgumentParser(
        prog="fastclip", description="Train, evaluate and export CLIP models."
    )
    parser.add_argument("--version", action="version", version=f"fastclip {__version__}")
    # The deepspeed launcher passes this to every process; the environment already says it.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="verb")

    train = verbs.add_parser("train", help="train a model")
    train.add_argument("recipe", help="a recipe's name, or package.module:function")
    train.add_argument("--data", default="", help="what the recipe trains on: folder or shards")
    train.add_argument("--dry-run", action="store_true", help="print the config and stop")
    train.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. run.steps=1000")
    train.set_defaults(run=_train)

    profile = verbs.add_parser("profile", help="where the time of a few steps goes")
    profile.add_argument("recipe", help="as for train")
    profile.add_argument("--data", default="", help="as for train")
    profile.add_argument("--steps", type=int, default=5, help="that are profiled, after a warm-up")
    profile.add_argument("--out", type=Path, default=Path("profile"), help="folder of the traces")
    profile.add_argument("overrides", nargs="*", metavar="field=value")
    profile.set_defaults(run=_profile)

    recipes = verbs.add_parser("recipes", help="list the recipes")
    recipes.set_defaults(run=_recipes)

    add_eval_verbs(verbs)

    export = verbs.add_parser("export", help="write weights for another library")
    export.add_argument("path", type=Path, help="a run's folder, or one of its checkpoints")
    export.add_argument("directory", type=Path, help="where to write")
    export.add_argument(
        "--layout",
        default="fastclip",
        choices=("fastclip", "openai", "open_clip", "huggingface"),
    )
    export.set_defaults(run=_export)

    add_search_verbs(verbs)
    add_experiment_verbs(verbs)
    add_data_verbs(verbs)

    doctor = verbs.add_parser("doctor", help="what is installed and which parts will use it")
    doctor.set_defaults(run=_doctor)
    return parser


def find_recipe(name: str) -> Recipe:
    """A recipe by short name or as ``package.module:function``.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    from fastclip.config import unknown_field
    from fastclip.recipes import RECIPES

    if ":" not in name:
        if name not in RECIPES:
            raise ValueError(unknown_field(f"recipe {name}", name, list(RECIPES)))
        return RECIPES[name]
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"recipe {name}: cannot import {module_name} ({error})") from None
    if not hasattr(module, function):
        raise ValueError(f"recipe {name}: {module_name} has no function {function!r}")
    return getattr(module, function)


def _train(options: argparse.Namespace) -> int:
    import json

    from fastclip.config import apply_overrides, to_dict

    config = apply_overrides(find_recipe(options.recipe)(options.data), options.overrides)
    if options.dry_run:
        print(json.dumps(to_dict(config), indent=2))
        return 0
    from fastclip.train import train

    return 0 if train(config).finished else EXIT_STOPPED


def _profile(options: argparse.Namespace) -> int:
    from fastclip.config import apply_overrides
    from fastclip.profiling import profile_run

    config = apply_overrides(find_recipe(options.recipe)(options.data), options.overrides)
    report = profile_run(config, options.out, options.steps)
    logger.info("%s", report)
    return 0


def _recipes(options: argparse.Namespace) -> int:
    del options
    from fastclip.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"{name:14s} {(recipe.__doc__ or '').strip().splitlines()[0]}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from fastclip.evaluate import load_trained
    from fastclip.models.interop import export_weights

    model, source = load_trained(options.path)
    export_weights(model, model.config, options.directory, layout=options.layout)
    print(f"{source} -> {options.directory} ({options.layout} layout)")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    del options
    from fastclip.doctor import doctor, format_report

    print(format_report(doctor()))
    return 0


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def _configure_logging() -> None:
    """Messages of fastclip to stderr, from rank 0 only below warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if launcher.is_main_process() else logging.WARNING)
    logger.propagate = False
