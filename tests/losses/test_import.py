"""The losses bring nothing along: not when imported, and not when used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALLOWED = (
    "fastclip",
    "fastclip.distributed",
    "fastclip.kernels",
    "fastclip.losses",
    "fastclip.ops",
)
HEAVY = ("deepspeed", "triton", "PIL", "transformers", "safetensors", "numpy.testing", "rich")

PROGRAM = f"""
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r} and name not in sys.modules:
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Blocked())
import fastclip.losses as losses
def extras():
    ours = {{name for name in sys.modules if name.split(".")[0] == "fastclip"}}
    allowed = {ALLOWED!r}
    return sorted(n for n in ours if n not in allowed and not n.startswith(
        tuple(part + "." for part in allowed[1:]))) + sorted(
        name for name in {HEAVY!r} if name in sys.modules)
before = extras()
x = torch.eye(3, requires_grad=True)
(losses.ClipLoss()(x, x, 10.0) + losses.SigLipLoss()(x, x, 10.0, -10.0)).backward()
print(before, extras(), bool(x.grad.isfinite().all()))
"""


def test_losses_train_where_nothing_but_torch_is_installed() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error:::fastclip", "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.stdout.strip() == "[] [] True", result.stdout + result.stderr
