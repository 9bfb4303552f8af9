"""The package as others get it: version, lean imports, refused bare `kernels`, wheel contents."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastclip

ROOT = Path(__file__).parents[1]


def _python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )


def test_version_is_the_distributions():
    assert importlib.metadata.version("fastclip-torch") == fastclip.__version__


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, fastclip; print(sorted({'torch', 'numpy', 'deepspeed'} & set(sys.modules)))"
    assert _python(code, cwd=ROOT).stdout.strip() == "[]"


def test_importing_the_loss_needs_torch_alone():
    heavy = ["deepspeed", "triton", "PIL", "transformers", "ftfy", "regex", "safetensors", "pyvips"]
    parts = ["models", "data", "engine", "config", "tokenizer"]
    code = (
        "import sys, torch; before = set(sys.modules); from fastclip.losses import ClipLoss; "
        f"new = set(sys.modules) - before; print(sorted(new & set({heavy!r})), "
        f"sorted(new & {{'fastclip.' + part for part in {parts!r}}}))"
    )
    assert _python(code, cwd=ROOT).stdout.strip() == "[] []"


def test_bare_kernels_is_refused():
    result = _python("import kernels", cwd=ROOT)
    assert result.returncode != 0
    assert "fastclip.kernels" in result.stderr


def test_kernels_is_one_tree():
    assert (ROOT / "fastclip" / "kernels").resolve() == ROOT / "kernels"


@pytest.mark.slow
def test_wheel_and_sdist_hold_real_files_and_import_elsewhere(tmp_path):
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    data = ("tokenizer/bpe_merges.txt", "eval/imagenet_templates.txt", "data/demo_packages.json")
    for name in ("kernels/reference.py", "py.typed", *data):
        assert f"fastclip/{name}" in names
    assert sum(name.endswith("_LICENSE") for name in names if "dist-info" in name) == 2
    for archive in (wheel, sdist):
        site = tmp_path / archive.suffix.strip(".")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(site), str(archive)], check=True, capture_output=True)
        code = (
            f"import sys; sys.path.insert(0, {str(site)!r}); import fastclip.losses, torch; "
            "from fastclip.tokenizer import Tokenizer; "
            "from fastclip.eval.prompts import imagenet_templates; "
            "from fastclip.data.demo_packages import PACKAGES; "
            "assert len(imagenet_templates()) == 80 and len(PACKAGES) == 18; "
            f"assert fastclip.__file__.startswith({str(site)!r}); "
            "loss = fastclip.losses.ClipLoss(); x = torch.eye(3); "
            "print(float(loss(x, x, torch.tensor(10.0))), Tokenizer()('a cat').shape)"
        )
        result = _python(code, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "torch.Size([1, 77])" in result.stdout
