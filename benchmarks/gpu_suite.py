"""Everything that a GPU is needed for, in named parts: ``python -m benchmarks.gpu_suite``.

Made for a machine that is there for minutes: every part has a limit, its rows are written as they
are measured, and the same command goes on where an earlier one stopped. A benchmark adds its part
to `PARTS`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.harness import RESUME

LONGEST = 600
"""Seconds that a part may take, and the default set altogether."""

NOTHING_COLLECTED = 5
"""pytest's exit status when no test matched."""

COLUMNS = (*record.STAMP_COLUMNS, "part", "state", "seconds", "status")
KEY = ("commit", "dirty", "device", "part", "state")


@dataclass(frozen=True)
class Part:
    """Commands that run one after another; the first that fails ends them."""

    name: str

    commands: tuple[tuple[str, ...], ...]
    """Arguments; the first is a program, or "python" for this interpreter."""

    seconds: int
    """Limit of all commands together."""

    by_default: bool = True

    stamped: bool = False
    """Whether the commands take --out, --commit and --dirty."""

    tool: str = ""
    """A program without which the part is skipped."""

    environment: Mapping[str, str] = field(default_factory=dict)


def _bench(name: str) -> tuple[str, ...]:
    return ("python", "-m", f"benchmarks.bench_{name}")


_PYTEST = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
_CHECK = ("python", "-m", "benchmarks.check_kernels")
_SANITIZE = ("compute-sanitizer", "--error-exitcode", "1", "--tool")

PARTS = (
    Part("triton_tests", ((*_CHECK,),), 120, stamped=True),
    Part(
        "gpu_tests",
        (
            (
                *_PYTEST,
                "-m",
                "gpu",
                "tests/kernels",
                "tests/losses",
                "tests/benchmarks",
                "tests/tokenizer",
                "tests/models/test_packing.py",
                "tests/engine",
                "tests/data",
            ),
        ),
        60,
    ),
    Part("contrastive", ((*_bench("contrastive"), "--seconds", "0.5"),), 240, stamped=True),
    Part("sigmoid", ((*_bench("sigmoid"), "--seconds", "0.5"),), 70, stamped=True),
    Part("similarity", ((*_bench("similarity"), "--seconds", "0.5"),), 70, stamped=True),
    Part(
        "tokenizer",
        ((*_bench("tokenizer_cuda"), "--only", "web", "--batches", "4096", "1048576"),),
        40,
        stamped=True,
    ),
    Part(
        "optim",
        ((*_bench("optim"), "--models", "ViT-B-32", "ViT-L-14"),),
        60,
        by_default=False,
        stamped=True,
    ),
    Part(
        "loader",
        ((*_bench("loader"), "--parts", "decode", "load"),),
        300,
        by_default=False,
        stamped=True,
    ),
    *(
        Part(
            f"step_{cases}",
            ((*_bench("step"), "--cases", cases, "--reference-tflop", "2000"),),
            LONGEST,
            by_default=False,
            stamped=True,
        )
        for cases in ("small", "dense", "grid", "large_batch", "maximum", "patch_dropout")
    ),
    Part("interpreter_tests", ((*_PYTEST, "tests/kernels"),), 300, by_default=False),
    *(
        Part(
            f"contrastive_{cases}",
            ((*_bench("contrastive"), "--cases", cases),),
            LONGEST,
            by_default=False,
            stamped=True,
        )
        for cases in ("headline", "accuracy", "forward", "ceiling", "stripe", "grid")
    ),
    Part(
        "sanitizer",
        tuple((*_SANITIZE, tool, *_CHECK, "--quick") for tool in ("memcheck", "racecheck")),
        600,
        by_default=False,
        stamped=True,
        tool="compute-sanitizer",
        # Out of bounds of a tensor must be out of bounds of an allocation.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
)


def run_part(
    part: Part, seconds: float, log: Path, stamp_arguments: Sequence[str]
) -> tuple[str, int | None]:
    """Run a part's commands, their output into `log`.

    Returns:
        "passed", "failed", "timed out", "empty" (no tests) or "skipped" (no tool), and the last
        exit status. A benchmark that lost the device is started again while there is time.
    """
    if part.tool and shutil.which(part.tool) is None:
        return "skipped", None
    end = time.monotonic() + seconds
    status = 0
    with log.open("ab") as output:
        for command in part.commands:
            arguments = [sys.executable if word == "python" else word for word in command]
            arguments += stamp_arguments if part.stamped else ()
            status = RESUME
            while status == RESUME:
                left = end - time.monotonic()
                finished = _run(arguments, left, output.fileno(), part.environment)
                if finished is None:
                    return "timed out", None
                status = finished
            if status == NOTHING_COLLECTED and "pytest" in command:
                return "empty", status
            if status != 0:
                return "failed", status
    return "passed", status


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """The command line; the exit status is 1 if a part failed or ran out of time."""
    options = _parser(parts).parse_args(arguments)
    chosen = [part for part in parts if part.name in options.part] or [
        part for part in parts if part.by_default
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        stamp = record.stamp(options.commit, options.dirty, device)
        rows = record.Record(options.out / "suite.csv", COLUMNS, KEY)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    stamp_arguments = ["--out", str(options.out.resolve()), "--commit", stamp.commit]
    stamp_arguments += ["--dirty"] if stamp.dirty else []
    start = time.monotonic()
    states: Counter[str] = Counter()
    for part in chosen:
        key = {**stamp.columns(), "part": part.name}
        if rows.has({**key, "state": "passed"}):
            print(f"{part.name}: passed before")
            states["passed before"] += 1
            continue
        begun = time.monotonic()
        left = options.limit or part.seconds
        if not options.part:
            left = min(left, LONGEST - (begun - start))
        log = options.out / f"{part.name}.log"
        state, status = run_part(part, left, log, stamp_arguments)
        took = time.monotonic() - begun
        rows.write({**key, "state": state, "seconds": took, "status": status})
        states[state] += 1
        _print_tail(log)
        print(f"{part.name}: {state} after {took:.0f} s", flush=True)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    print(
        f"gpu_suite: {len(chosen)} parts: {counts}; {time.monotonic() - start:.0f} s on "
        f"{stamp.device}, rows in {options.out}"
    )
    return int(states["failed"] + states["timed out"] > 0)


def _parser(parts: Sequence[Part]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite")
    add = parser.add_argument
    default = ", ".join(part.name for part in parts if part.by_default)
    names = [part.name for part in parts]
    add("--part", nargs="+", default=[], choices=names, help=f"default: {default}")
    add("--limit", type=_seconds, help=f"seconds for each part, up to {LONGEST}")
    add("--out", type=Path, default=record.RESULTS, help="folder of rows and logs")
    add("--commit", help="default: git's")
    add("--dirty", action="store_true", help="the files differ from the commit")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"between 0 and {LONGEST} seconds, not {text}")
    return seconds


def _run(
    arguments: Sequence[str], seconds: float, output: int, environment: Mapping[str, str]
) -> int | None:
    """Exit status of a command, None if it was stopped after `seconds`."""
    if seconds <= 0:
        return None
    process = subprocess.Popen(
        arguments, cwd=record.ROOT, env={**os.environ, **environment}, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children too: the session is its own
        process.wait()
        return None


def _print_tail(log: Path, lines: int = 20) -> None:
    if log.exists():
        print("\n".join(log.read_text(errors="replace").splitlines()[-lines:]))


if __name__ == "__main__":
    sys.exit(main())
