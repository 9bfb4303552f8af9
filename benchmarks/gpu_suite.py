"""What a GPU is needed for, in named parts: ``python -m benchmarks.gpu_suite``.

Made for a machine that is there for minutes: every part has a limit, its rows are written as they
are measured, and the same command goes on where an earlier one stopped. A benchmark adds its part
to `PARTS`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
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

GRACE = 10.0
"""Seconds that an interrupted command has to say where it was."""

SHORTEST = 10.0
"""Seconds left under which no part is begun."""

PEERS = ("open_clip_torch", "deepspeed", "memeff", "inf-cl", "cut-cross-entropy", "siglip-kernel",
         "torchao", "apex", "xformers")  # fmt: skip
"""What parts measure or test beside ours, where it is installed."""

COLUMNS = (*record.STAMP_COLUMNS, "peers", "part", "state", "seconds", "status")
KEY = ("commit", "dirty", "device", "peers", "part", "state")


@dataclass(frozen=True)
class Part:
    """Commands that run one after another."""

    name: str

    commands: tuple[tuple[str, ...], ...]
    """Arguments; the first is a program, or "python" for this interpreter."""

    seconds: int
    """Limit of all commands together."""

    by_default: bool = True

    stamped: bool = False
    """Whether the commands take --out, --commit and --dirty."""

    tool: str = ""
    """A program without which the part is skipped; also looked for where CUDA is."""

    independent: bool = False
    """Whether the other commands run after one that failed."""

    environment: Mapping[str, str] = field(default_factory=dict)


def _bench(name: str) -> tuple[str, ...]:
    return ("python", "-m", f"benchmarks.bench_{name}")


_PYTEST = ("python", "-m", "pytest", "-p", "no:cacheprovider")
# A line for each test: of a run that was killed, the last one says where.
_GPU_TESTS = (*_PYTEST, "-v", "-m", "gpu and not slow")
_CHECK = ("python", "-m", "benchmarks.check_kernels")
_SANITIZE = ("compute-sanitizer", "--error-exitcode", "1", "--tool")
_SANITIZERS = {
    # Triton asks the driver for what it may not have, and goes on.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--racecheck-report", "analysis", "--racecheck-detect-level", "error"),
}

PARTS = (
    Part("triton_tests", ((*_CHECK,),), 120, stamped=True),
    Part(
        "gpu_tests",
        # Files and not folders: the others need more packages than torch, Triton and pytest. Three
        # commands, since a conftest that cannot be imported ends all of one: tests/models' needs
        # transformers. The tokenizer's tests need its extension, built with nvcc.
        (
            (
                *_GPU_TESTS,
                "tests/kernels/test_gpu.py",
                "tests/kernels/test_similarity.py",
                "tests/kernels/test_compact_adamw.py",
                "tests/benchmarks/test_timing.py",
                "tests/engine/test_host_reads.py",
            ),
            (*_GPU_TESTS, "tests/models/test_packing.py", "tests/models/test_compiled.py"),
            (*_GPU_TESTS, "tests/tokenizer/test_cuda.py"),
        ),
        300,
        independent=True,
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
        240,
        by_default=False,
        stamped=True,
    ),
    # DALI's tests and rates need its wheel.
    Part("dali_tests", ((*_GPU_TESTS, "tests/data/test_dali.py"),), 120, by_default=False),
    # On photographs that it fetches: without a network only where demo/loader/downloads was brought
    # along, and DALI's wheel for its row.
    Part(
        "loader",
        ((*_bench("loader"), "--parts", "gpu", "decode", "load"),),
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
    # On what `fastclip data demo` builds. Longer than a call: the same command goes on.
    Part(
        "training",
        ((*_bench("training"), "--cases", "gpu"),),
        LONGEST,
        by_default=False,
        stamped=True,
    ),
    # Whether its step ever waits for data.
    Part(
        "training_b32",
        (
            (
                *_bench("training"),
                "--cases",
                "gpu",
                "--model",
                "ViT-B-32",
                "--batches",
                "1024",
                "--epochs",
                "5",
                "--seeds",
                "1",
            ),
        ),
        LONGEST,
        by_default=False,
        stamped=True,
    ),
    Part("interpreter_tests", ((*_PYTEST, "-q", "tests/kernels"),), 300, by_default=False),
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
    *(
        Part(
            f"sanitizer_{tool}",
            ((*_SANITIZE, tool, *options, *_CHECK, "--quick", "--no-judge"),),
            LONGEST,
            by_default=False,
            stamped=True,
            tool=_SANITIZE[0],
            # Out of bounds of a tensor must be out of bounds of an allocation.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool, options in _SANITIZERS.items()
    ),
)


def run_part(
    part: Part, seconds: float, log: Path, stamp_arguments: Sequence[str]
) -> tuple[str, int | None]:
    """Run a part's commands, their output into `log`.

    Returns:
        "passed", "failed", "timed out", "empty" (no tests) or "skipped" (no tool), and the exit
        status: the first that failed, or 0. A benchmark that lost the device is started again while
        there is time.
    """
    tool = find_tool(part.tool) if part.tool else ""
    if tool is None:
        return "skipped", None
    programs = {"python": sys.executable, part.tool: tool}
    end = time.monotonic() + seconds
    result: tuple[str, int | None] = "passed", 0
    with log.open("ab") as output:
        for command in part.commands:
            arguments = [programs.get(word, word) for word in command]
            arguments += stamp_arguments if part.stamped else ()
            status = RESUME
            while status == RESUME:
                left = end - time.monotonic()
                finished = _run(arguments, left, output.fileno(), part.environment)
                if finished is None:
                    return "timed out", None
                status = finished
            if status == 0:
                continue
            if result[0] != "failed":
                empty = status == NOTHING_COLLECTED and "pytest" in command
                result = "empty" if empty else "failed", status
            if not part.independent:
                break
    return result


def find_tool(name: str) -> str | None:
    """The path of a program: on PATH, or where CUDA keeps its own."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [f"{home}/bin" for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def peers() -> str:
    """Installed peers with their versions: with others, a part is another measurement."""
    found = ((name, record.version_of(name)) for name in PEERS)
    return ", ".join(f"{name} {version}" for name, version in found if version)


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """The command line; the exit status is 1 if a part failed, or not all had time."""
    options = _parser(parts).parse_args(arguments)
    by_name = {part.name: part for part in parts}
    chosen = [by_name[name] for name in dict.fromkeys(options.part)] or [
        part for part in parts if part.by_default
    ]
    total = options.total or (math.inf if options.part else LONGEST)
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
    installed = peers()
    for part in chosen:
        key = {**stamp.columns(), "peers": installed, "part": part.name}
        if rows.has({**key, "state": "passed"}):
            print(f"{part.name}: passed before")
            states["passed before"] += 1
            continue
        begun = time.monotonic()
        left = total - (begun - start)
        if left < SHORTEST:
            rows.write({**key, "state": "not started"})
            states["not started"] += 1
            print(f"{part.name}: not started: {max(left, 0):.0f} s of {total:.0f} s are left")
            continue
        left = min(left, options.limit or part.seconds)
        log = options.out / f"{part.name}.log"
        _note_state(log, "before", device)
        state, status = run_part(part, left, log, stamp_arguments)
        took = time.monotonic() - begun
        _note_state(log, "after", device)
        rows.write({**key, "state": state, "seconds": took, "status": status})
        states[state] += 1
        _print_tail(log)
        print(f"{part.name}: {state} after {took:.0f} s", flush=True)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    print(
        f"gpu_suite: {len(chosen)} parts: {counts}; {time.monotonic() - start:.0f} s on "
        f"{stamp.device}, rows in {options.out}"
    )
    return int(states["failed"] + states["timed out"] + states["not started"] > 0)


def _parser(parts: Sequence[Part]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite")
    add = parser.add_argument
    default = ", ".join(part.name for part in parts if part.by_default)
    names = [part.name for part in parts]
    add("--part", nargs="+", default=[], choices=names, help=f"in this order; default: {default}")
    add("--limit", type=_seconds, help=f"seconds for each part, up to {LONGEST}")
    add("--total", type=float, help=f"seconds for all; without --part, {LONGEST} by default")
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
        arguments, cwd=record.ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        # To its children too: the session is its own. pytest prints what failed, and where it was.
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _note_state(log: Path, when: str, device: torch.device) -> None:
    """The GPU's state into a part's log: a rate of a throttled one is to be known as that."""
    if device.type == "cuda":
        with log.open("a", encoding="utf-8") as file:
            file.write(f"[{when}] {record.gpu_state()}\n")


def _print_tail(log: Path, lines: int = 20) -> None:
    if log.exists():
        print("\n".join(log.read_text(errors="replace").splitlines()[-lines:]))


if __name__ == "__main__":
    sys.exit(main())
