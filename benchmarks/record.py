"""Rows of a benchmark in a CSV file: stamped, written one by one, not measured twice."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from fastclip.provenance import git

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

STAMP_COLUMNS = ("commit", "dirty", "date", "device", "python", "torch", "triton")


@dataclass(frozen=True)
class Stamp:
    """What a row was measured on."""

    commit: str
    dirty: bool
    device: str

    def columns(self) -> dict[str, object]:
        """Commit, date, device, versions; "" for a package that is not installed."""
        return {
            **asdict(self),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
        }


def stamp(commit: str | None, dirty: bool, device: torch.device) -> Stamp:
    """The stamp of this tree on `device`; commit and dirty flag from git where not given.

    Raises:
        ValueError: there is no commit to name.
    """
    if commit is None:
        commit = git(ROOT, "rev-parse", "HEAD")
        # Rows already written are no change of what is measured.
        changes = git(ROOT, "status", "--porcelain", "--", ".", ":!benchmarks/results")
        if not commit or changes is None:
            raise ValueError(
                f"git knows no commit of {ROOT}: give --commit HASH, and --dirty if the files "
                "differ from it"
            )
        dirty = dirty or bool(changes)
    return Stamp(commit, dirty, device_name(device))


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's, its cores and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu ({cpu_model()}, {os.cpu_count()} cores, {threads} threads)"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the processor calls itself, or its architecture where it does not say."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()


_STATE = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,"
    "temperature.gpu,{reasons},memory.total"
)


def gpu_state() -> str:
    """What nvidia-smi says of clocks, power and temperature, and which CUDA and cuDNN torch has."""
    versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    program = shutil.which("nvidia-smi")
    if program is None:
        return f"{versions}\nnvidia-smi: not found"
    said = ""
    # Drivers renamed the column.
    for reasons in ("clocks_throttle_reasons.active", "clocks_event_reasons.active"):
        query = [program, f"--query-gpu={_STATE.format(reasons=reasons)}", "--format=csv"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{versions}\nnvidia-smi: {error}"
        said = (done.stdout + done.stderr).strip()
        if done.returncode == 0:
            break
    return f"{versions}\n{said}"


def version_of(distribution: str) -> str:
    """Its installed version, "" if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


class Record:
    """A CSV file that grows by whole rows; those of the same key are not written again.

    Args:
        path: the file; its folder is made.
        columns: names of the columns, in order.
        key: the columns that say which measurement a row is.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], key: tuple[str, ...]) -> None:
        self.path, self.columns, self.key = path, columns, key
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_partial_line(path)
        self.rows = read_rows(path)
        with path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            if header is None:
                csv.writer(file, lineterminator="\n").writerow(columns)
            elif tuple(header) != columns:
                raise ValueError(f"{path} has other columns than are written now: move it away")
        self._known = {self._key_of(row) for row in self.rows}

    def has(self, values: Mapping[str, object]) -> bool:
        """Whether there is a row with these values of the key's columns."""
        return self._key_of(values) in self._known

    def write(self, values: Mapping[str, object]) -> None:
        """Append one row and flush it; None becomes an empty cell, what is not given too."""
        unknown = values.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
        row = {name: _text(values.get(name)) for name in self.columns}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        self.rows.append(row)
        self._known.add(self._key_of(row))

    def _key_of(self, values: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(_text(values[name]) for name in self.key)


class Started:
    """Says in a file which measurement is under way, so that one that never ends is known later.

    An exception, an interrupt among them, removes the file; a killed process leaves it behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def during(self, row: Mapping[str, object]) -> Iterator[None]:
        """Around a measurement; `row` is what is known of its row before."""
        text = json.dumps({name: _text(value) for name, value in row.items()})
        self.path.write_text(text, encoding="utf-8")
        try:
            yield
        finally:
            self.path.unlink(missing_ok=True)

    def left_behind(self) -> dict[str, str] | None:
        """The row of a measurement whose process was killed; the file is removed."""
        if not self.path.exists():
            return None
        text = self.path.read_text(encoding="utf-8")
        self.path.unlink()
        with contextlib.suppress(ValueError):  # killed while it was written
            return json.loads(text)
        return None


def read_rows(path: Path) -> list[dict[str, str]]:
    """A file's rows, [] if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    # One line per row, so that an interrupted write is seen as a line without an end.
    return " ".join(str(value).split())


def _drop_partial_line(path: Path) -> None:
    """Cut off what an interrupted write left behind."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])
