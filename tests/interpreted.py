"""Runs every Triton kernel in Triton's interpreter, on a CPU, and prints its errors as JSON.

A program of its own, because the interpreter is chosen before Triton is first imported:
``TRITON_INTERPRET=1 python tests/interpreted.py``. Outputs are poisoned with NaN beforehand, so
that an entry nobody writes is seen. (bf16 products are wrong in the interpreter: fp32 and fp16.)
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from torch import Tensor

from fastclip.kernels import contrastive, reference, sigmoid
from fastclip.losses import clip_loss, siglip_loss
from fastclip.ops.contrastive import contrastive_gradients, contrastive_statistics
from fastclip.ops.sigmoid import sigmoid_gradients, sigmoid_loss
from loss_oracles import clip_expected, error, features, siglip_expected

warnings.filterwarnings("ignore", category=RuntimeWarning)

# rows, pairs, dims, first row, several positives, label smoothing
SHAPES = (
    (1, 1, 5, 0, False, 0.0),
    (33, 33, 64, 0, False, 0.0),
    (70, 131, 80, 40, True, 0.1),
    (40, 67, 512, 27, False, 0.0),
    (35, 35, 640, 0, True, 0.0),
    (34, 66, 768, 32, False, 0.2),
    (33, 33, 1024, 0, False, 0.0),
    (33, 40, 1152, 7, True, 0.05),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def _poison() -> None:
    """Make memory that is asked for without content hold NaN."""
    plain = Tensor.new_empty

    def poisoned(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        tensor = plain(self, *arguments, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    Tensor.new_empty = poisoned


def _ids(pairs: int, several: bool) -> Tensor | None:
    return torch.arange(pairs) % 7 if several else None


def passes(kind: str, dtype: torch.dtype, shape: tuple, scale: float) -> dict[str, float]:
    """Errors of a stripe's passes against the reference in fp64, on the same rounded features."""
    b, n, dims, first, several, smoothing = shape
    image, text = (x.to(dtype) for x in features(n, dims))
    rows, ids = image[first : first + b], _ids(n, several)
    options: dict[str, Any] = {"row_offset": first}
    if ids is not None:
        options |= {"row_ids": ids[first : first + b], "column_ids": ids}
    s, bias = torch.tensor(scale), torch.tensor(-scale / 3)
    wide = (rows.double(), text.double(), s.double())
    # Two chunks of rows where there are more than one tile.
    small = {"chunk_elements": 128 * n}
    if kind == "sigmoid":
        loss = reference.sigmoid_loss(*wide, bias.double(), **options)
        value = sigmoid.sigmoid_loss(rows, text, s, bias, **options, **small)
        expected = reference.sigmoid_gradients(*wide, bias.double(), **options)
        result = sigmoid.sigmoid_gradients(rows, text, s, bias, **options, **small)
        names = ("d_rows", "d_columns", "d_scale", "d_bias")
        floor = 1e-3 * max(float(x.norm()) for x in expected if x is not None)
        errors = {"loss": error(value, loss)}
    else:
        options["label_smoothing"] = smoothing
        stats = reference.contrastive_statistics(*wide, **options)
        mine = contrastive.contrastive_statistics(rows, text, s, **options, **small)
        errors = {
            f"statistics {name}": error(
                getattr(mine, name).nan_to_num(neginf=-1e3),
                getattr(stats, name).nan_to_num(neginf=-1e3),
                1.0,
            )
            for name in ("others_of_row", "others_of_column", "own", "gap")
        }
        whole = reference.contrastive_statistics(image.double(), text.double(), s.double())
        arguments = (whole.others_of_column, whole.own)
        expected = reference.contrastive_gradients(
            *wide, stats.others_of_row, *arguments, **options
        )
        result = contrastive.contrastive_gradients(
            rows, text, s, mine.others_of_row, *(x.float() for x in arguments), **options, **small
        )
        names = ("d_rows", "d_columns", "d_scale")
        floor = 1e-3 * max(float(x.norm()) for x in expected if x is not None)
    for name in names:
        value, wanted = getattr(result, name), getattr(expected, name)
        errors[name] = error(value, wanted, max(floor, 1e-12))
    return errors


def whole_losses() -> dict[str, float]:
    """`clip_loss` and `siglip_loss` by Triton against the definitions, value and gradients."""
    errors = {}
    for kind in ("softmax", "sigmoid"):
        image, text = (x.float() for x in features(45, 24))
        x, y = image.clone().requires_grad_(), text.clone().requires_grad_()
        s = torch.tensor([20.0], requires_grad=True)
        b = torch.tensor(-4.0, requires_grad=True)
        if kind == "softmax":
            expected = clip_expected(image, text, 20.0)
            loss = clip_loss(x, y, s, impl="triton")
        else:
            expected = siglip_expected(image, text, 20.0, -4.0)
            loss = siglip_loss(x, y, s, b, impl="triton")
        loss.backward()
        results = (loss.detach(), x.grad, y.grad, s.grad, b.grad)
        for name, value, wanted in zip(expected._fields, results, expected, strict=True):
            if wanted is not None:
                assert value is not None
                errors[f"{kind} {name}"] = error(value.reshape(wanted.shape), wanted)
    return errors


def nan_in_nan_out() -> bool:
    """Whether one broken feature is seen in every result that depends on it."""
    image, text = (x.float() for x in features(20, 8))
    image[3, 2] = float("nan")
    loss = clip_loss(image, text, 10.0, impl="triton")
    other = siglip_loss(image, text, 10.0, -1.0, impl="triton")
    return bool(loss.isnan() and other.isnan())


def operators() -> bool:
    """torch.library's own checks of schema and fake implementation, for each operator."""
    image, text = (x.float() for x in features(9, 6))
    s, b = torch.tensor(5.0), torch.tensor(-2.0)
    tests = ("test_schema", "test_faketensor")
    for impl in ("reference", "triton"):
        for ids in (None, torch.arange(9) // 2):
            mine = None if ids is None else ids[2:7]
            stripe = (image[2:7], text, s)
            statistics = (*stripe, mine, ids, 2, 0.1, impl)
            torch.library.opcheck(contrastive_statistics, statistics, test_utils=tests)
            others, columns, _, _ = contrastive_statistics(*statistics)
            own = s * (image * text).sum(1)
            for need in ((True, True), (True, False), (False, True)):
                arguments = (*stripe, others, columns, own, mine, ids, 2, 0.1, *need, impl)
                torch.library.opcheck(contrastive_gradients, arguments, test_utils=tests)
                arguments = (*stripe, b, mine, ids, 2, *need, impl)
                torch.library.opcheck(sigmoid_gradients, arguments, test_utils=tests)
            torch.library.opcheck(sigmoid_loss, (*stripe, b, mine, ids, 2, impl), test_utils=tests)
    return True


def main() -> None:
    """Everything, as one JSON object on stdout."""
    torch.manual_seed(0)
    report: dict[str, Any] = {"operators": operators()}
    _poison()
    report["passes"] = {
        f"{kind} {name} {shape} {scale}": passes(kind, dtype, shape, scale)
        for kind in ("softmax", "sigmoid")
        for name, dtype in DTYPES.items()
        for shape in SHAPES
        for scale in (1.0, 100.0)
    }
    report["losses"] = whole_losses()
    report["nan"] = nan_in_nan_out()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
