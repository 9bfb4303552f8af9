"""Every example runs, and says at its end that what it claims is so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {
    "open_clip_training": "open_clip",
    "huggingface_clip": "transformers",
    "sentence_transformers_training": "sentence_transformers",
}
# A CUDA build of torchvision may stand beside a CPU build of torch in the tests' environment.
RUN = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.torchvision_beside_cpu import declare_operators
import fastclip
sys.path.pop(0)
declare_operators()
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def test_the_list_is_complete() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    assert len(EXAMPLES) >= 4
    assert all(f"`{example.name}`" in listed for example in EXAMPLES)
    assert listed.count(".py`") == len(EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    needed = NEEDS.get(example.stem)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT), str(example)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ok: ")
