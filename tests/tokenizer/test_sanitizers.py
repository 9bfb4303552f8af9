"""The C++ core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fastclip.tokenizer.vocabulary import MERGES_PATH

ROOT = Path(__file__).parents[2]
CORE = ["unicode", "entities", "clean", "vocabulary", "bpe", "ascii", "encoder", "batch"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("sanitizers", "texts", "threads"),
    [("address,undefined", 20_000, 2), ("thread", 4_000, 8)],
    ids=["address", "thread"],
)
def test_random_texts(tmp_path: Path, sanitizers: str, texts: int, threads: int):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "stress"
    command = [
        *(compiler, "-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizers}"),
        *("-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", "-o", str(program)),
        *(str(ROOT / "csrc" / f"{name}.cpp") for name in CORE),
        str(Path(__file__).with_name("stress.cpp")),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 and "cannot find" in built.stderr:
        pytest.skip(f"{compiler} has no {sanitizers} sanitizer")
    assert built.returncode == 0, built.stderr[-3000:]
    run = [str(program), str(MERGES_PATH), "20261123", str(texts), str(threads)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{texts} texts, {threads} threads" in done.stdout
