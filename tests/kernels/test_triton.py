"""The Triton kernels in the interpreter: errors against fp64, operators, ranks."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.losses import clip_loss, siglip_loss
from fastclip.ops.dispatch import choose
from loss_oracles import clip_expected, error, features
from ranks import run_ranks
from triton_support import skip_without_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3}
ROUNDING = 6e-8


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    skip_without_interpreter()
    program = Path(__file__).parents[1] / "interpreted.py"
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("softmax", "fp32"), ("softmax", "fp16"), ("softmax kept", "fp32"), ("sigmoid", "fp32"),
     ("sigmoid", "fp16")],
)  # fmt: skip
def test_passes_equal_the_reference(report: dict[str, Any], kind: str, dtype: str) -> None:
    cases = {k: v for k, v in report["passes"].items() if k.startswith(f"{kind} {dtype} ")}
    assert len(cases) == 18
    worst: dict[str, float] = {}
    for case, errors in cases.items():
        for name, value in errors.items():
            features_ = name in ("row_products", "column_products")
            assert value < (TOLERANCE[dtype] if features_ else 1e-5), (case, name, value)
            worst[name] = max(worst.get(name, 0.0), value)
    print(f"{kind} {dtype}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))


def test_one_block_of_the_gradient_lives_at_a_time(report: dict[str, Any]) -> None:
    assert report["blocks alive"] == 1


def test_losses_equal_their_definitions(report: dict[str, Any]) -> None:
    assert len(report["losses"]) == 26
    for name, value in report["losses"].items():
        assert value < 1e-5, (name, value)


def test_preparing_and_finishing_pairs(report: dict[str, Any]) -> None:
    assert len(report["pairs"]) == 140
    for name, value in report["pairs"].items():
        assert value < (TOLERANCE["fp16"] if "float16" in name else 2e-6), (name, value)


def test_what_one_exponential_cannot_hold(report: dict[str, Any]) -> None:
    """Within the accuracy contract, whose scalars may be right by luck on the plain path."""
    assert len(report["extremes"]) == 12
    for case, fields in report["extremes"].items():
        for name, (mine, theirs, scale) in fields.items():
            lucky = ROUNDING * (max(8.0, scale) if name in ("loss", "d_scale") else 5.0)
            if case.startswith("tiny") and name == "d_scale":
                lucky = 1e-5  # a sum that cancels to a thousandth of its terms
            assert mine <= max(1.5 * theirs, lucky), (case, name, mine, theirs)


def test_operators_pass_torchs_checks_and_nan_is_not_hidden(report: dict[str, Any]) -> None:
    assert report["operators"] is True
    assert report["nan"] is True


def test_losses_are_one_graph_to_the_compiler(report: dict[str, Any]) -> None:
    assert len(report["compiled"]) == 4
    assert set(report["compiled"].values()) == {0.0}


SIZES = (37, 5)
# Eight times as long, the last rank's texts give logits beyond fp32's e^88: whoever bounds logits
# by the norms of other texts overflows.
STRIPES = tuple(itertools.product((1.0, 8.0), (False, True)))


def _stretched(length: float) -> tuple[Tensor, Tensor]:
    image, text = (x.float() for x in features(sum(SIZES), 20))
    text[SIZES[0] :] *= length
    return image, text


def _on_ranks(runtime: Any) -> Any:
    return [_share_of_the_loss(runtime, *stripe) for stripe in STRIPES]


def _share_of_the_loss(runtime: Any, length: float, ring: bool) -> Any:
    x, y = (each.split(list(SIZES))[runtime.rank].clone() for each in _stretched(length))
    x, y = x.requires_grad_(), y.requires_grad_()
    s = torch.tensor(30.0, requires_grad=True)
    loss = clip_loss(x, y, s, ring=ring, impl="triton")
    loss.backward()
    return loss.detach(), x.grad, y.grad, s.grad


def test_stripes_of_two_ranks_equal_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_interpreter()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    by_rank = run_ranks(_on_ranks, 2, tmp_path)
    for (length, _), *results in zip(STRIPES, *by_rank, strict=True):
        image, text = _stretched(length)
        expected = clip_expected(image, text, 30.0)
        assert length == 1.0 or 30.0 * float((image @ text.T).max()) > 88.0
        assert error(torch.cat([r[1] for r in results]) / 2, expected.d_image) < 1e-5
        assert error(torch.cat([r[2] for r in results]) / 2, expected.d_text) < 1e-5
        for result in results:
            assert error(result[0], expected.loss) < 1e-6
            assert error(result[3], expected.d_scale) < 1e-5


def test_what_triton_cannot_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = (x.float() for x in features(4, 3))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors, these are on cpu"):
        clip_loss(image, text, 1.0, impl="triton")
    with pytest.raises(ValueError, match="impl is auto, reference, triton, not 'cuda'"):
        siglip_loss(image, text, 1.0, 0.0, impl="cuda")  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="not fp64"):
        choose("triton", image.double())
    assert choose("auto", image) == "reference"
