"""Resize and phrase matching under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("sanitizers", "cases", "threads"),
    [("address,undefined", 600, 1), ("thread", 60, 4)],
    ids=["address", "thread"],
)
def test_random_images_and_phrases(
    tmp_path: Path, sanitizers: str, cases: int, threads: int
) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "stress"
    sources = [ROOT / "csrc" / f"{n}.cpp" for n in ("resample", "resample_x86", "phrases")]
    command = [
        *(compiler, "-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizers}"),
        *("-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", "-o", str(program)),
        *map(str, [*sources, Path(__file__).with_name("stress.cpp")]),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 and "cannot find" in built.stderr:
        pytest.skip(f"{compiler} has no {sanitizers} sanitizer")
    assert built.returncode == 0, built.stderr[-3000:]
    run = [str(program), "20261126", str(cases), str(threads)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{cases} cases" in done.stdout
