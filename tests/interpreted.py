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
import weakref
from functools import partial
from pathlib import Path
from typing import Any

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.kernels import contrastive, pairs, reference, sigmoid
from fastclip.kernels.tiling import ProductsWithG
from fastclip.losses import clip_loss, siglip_loss
from fastclip.ops.contrastive import (
    contrastive_products,
    contrastive_statistics,
    contrastive_summary,
)
from fastclip.ops.pairs import finish_pairs, prepare_pairs
from fastclip.ops.sigmoid import sigmoid_loss, sigmoid_products
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
    (20, 300, 16, 275, True, 0.0),
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


def softmax_passes(
    image: Tensor, text: Tensor, scale: float, shape: tuple, kept: bool
) -> dict[str, float]:
    """Errors of a stripe's passes against the reference in fp64, on the same rounded features."""
    b, n, _, first, several, smoothing = shape
    rows, ids, s = image[first : first + b], _ids(n, several), torch.tensor(scale)
    part = slice(first, first + b)
    options: dict[str, Any] = {"row_offset": first}
    if ids is not None:
        options |= {"row_ids": ids[part], "column_ids": ids}
    found, errors = [], {}
    for module, operands in (
        (contrastive, (rows, text)),
        (reference, (rows.double(), text.double())),
    ):
        exact = module is reference
        whole = reference.prepare_pairs(image.double(), text.double(), torch.float64)
        product, row_norm, column_norm = (x if exact else x.float() for x in whole[2:])
        common = (*operands, s.double() if exact else s, product[part], row_norm[part], column_norm)
        # Several blocks where there is more than one tile; the first of them is kept.
        small = {} if exact else {"block_elements": 128 * n}
        budget = {} if exact or not kept else {"memory_budget": 128 * 128 * 4}
        more = {"label_smoothing": smoothing, **options, **small}
        statistics = module.contrastive_statistics(*common, **more, **budget)
        assert exact or (statistics.exponentials.numel() > 0) == kept
        # The columns' statistics of all rows, as if combined over ranks.
        every = reference.contrastive_statistics(
            image.double(), text.double(), s.double(), *whole[2:]
        )
        positives = None if ids is None else reference.positives_of(ids[part], ids)
        target = reference.own_targets(positives, smoothing, product[part], n)
        summary = module.contrastive_summary(
            statistics.others_of_row, every.others_of_column, product, s, statistics.gap, target,
            row_offset=first,
        )  # fmt: skip
        products = module.contrastive_products(
            *common, *summary[1:], statistics.exponentials, torch.tensor(3.0), **more
        )
        found.append((statistics, summary, products))
    (mine, summary, products), (stats, expected_summary, expected) = found
    for name in ("others_of_row", "others_of_column", "gap"):
        errors[f"statistics {name}"] = error(
            getattr(mine, name).nan_to_num(neginf=-1e3),
            getattr(stats, name).nan_to_num(neginf=-1e3),
            1.0,
        )
    errors["loss"] = error(summary.loss, expected_summary.loss, 1e-3)
    errors["own_entry"] = error(summary.own_entry, expected_summary.own_entry, 1e-3)
    floor = max(1e-3 * max(float(x.norm()) for x in expected), 1e-12)
    for name in expected._fields:
        errors[name] = error(getattr(products, name), getattr(expected, name), floor)
    return errors


def sigmoid_passes(image: Tensor, text: Tensor, scale: float, shape: tuple) -> dict[str, float]:
    """As `softmax_passes`."""
    b, n, _, first, several, _ = shape
    rows, ids = image[first : first + b], _ids(n, several)
    s, bias = torch.tensor(scale), torch.tensor(-scale / 3)
    options: dict[str, Any] = {"row_offset": first}
    if ids is not None:
        options |= {"row_ids": ids[first : first + b], "column_ids": ids}
    wide = (rows.double(), text.double(), s.double(), bias.double())
    product = (wide[0] * wide[1][first : first + b]).sum(1)
    small = {"block_elements": 128 * n}
    loss = reference.sigmoid_loss(*wide, **options)
    errors = {"loss": error(sigmoid.sigmoid_loss(rows, text, s, bias, **options, **small), loss)}
    expected = reference.sigmoid_products(*wide, product, **options)
    found = sigmoid.sigmoid_products(rows, text, s, bias, product.float(), **options, **small)
    half = rows.dtype == torch.float16  # whose numbers end at 6e-8
    largest = max(float(x.norm()) for x in expected if x is not None)
    floor = max(1e-3 * largest, 1e-6 if half else 1e-12)
    for name in expected._fields:
        errors[name] = error(getattr(found, name), getattr(expected, name), floor)
    return errors


def whole_losses() -> dict[str, float]:
    """`clip_loss` and `siglip_loss` by Triton against the definitions, value and gradients."""
    errors = {}
    for kind in ("softmax", "softmax kept", "sigmoid"):
        for normalize in (False, True):
            image, text = (x.float() for x in features(45, 24))
            if normalize:
                image = image * torch.linspace(1e-3, 30.0, 45)[:, None]
                image[7] = 0.0
            x, y = image.clone().requires_grad_(), text.clone().requires_grad_()
            s = torch.tensor([20.0], requires_grad=True)
            b = torch.tensor(-4.0, requires_grad=True)
            a = image.double().requires_grad_()
            unit = F.normalize(a, dim=1) if normalize else a
            if kind == "sigmoid":
                expected = siglip_expected(unit.detach(), text, 20.0, -4.0)
                loss = siglip_loss(x, y, s, b, normalize=normalize, impl="triton")
            else:
                budget = 0 if kind == "softmax" else 1 << 20
                expected = clip_expected(unit.detach(), text, 20.0)
                loss = clip_loss(x, y, s, normalize=normalize, memory_budget=budget, impl="triton")
            (loss * 2).backward()
            unit.backward(expected.d_image)
            d_text = expected.d_text
            if normalize:
                unit_text = F.normalize(text.double(), dim=1).requires_grad_()
                F.normalize(unit_text, dim=1).backward(d_text)
                d_text = unit_text.grad
            wanted = (expected.loss, a.grad, d_text, *expected[3:])
            results = (2 * loss.detach(), x.grad, y.grad, s.grad, b.grad)
            for name, value, exact in zip(expected._fields, results, wanted, strict=True):
                if exact is not None:
                    assert value is not None
                    label = f"{kind} {name}{' normalised' if normalize else ''}"
                    errors[label] = error(value.reshape(exact.shape) / 2, exact)
    return errors


def finish(module: Any, arguments: list[Any], normalize: bool) -> tuple[Tensor, Tensor]:
    """A module's `finish_pairs`."""
    return module.finish_pairs(*arguments, normalize=normalize)


def prepared() -> dict[str, float]:
    """Errors of preparing and finishing pairs: odd sizes, strides, zero rows, casts."""
    errors = {}
    for dims in (1, 5, 64, 257, 640):
        for normalize in (False, True):
            for dtype in (torch.float32, torch.float16):
                image, text = (x.float() for x in features(7, max(dims, 2)))
                image, text = image[:, :dims] * 5, text.T.contiguous().T[:, :dims]
                image[2] = 0.0
                text[4] = 0.0
                found = pairs.prepare_pairs(image, text, dtype, normalize=normalize)
                wanted = reference.prepare_pairs(
                    image.double(), text.double(), torch.float64, normalize=normalize
                )
                label = f"{dims} {dtype} {normalize}"
                for name in wanted._fields:
                    value, exact = getattr(found, name), getattr(wanted, name)
                    assert name not in ("rows", "columns") or value.dtype == dtype
                    errors[f"{name} {label}"] = error(value, exact, 1e-3)
                arguments: list[Any] = [
                    *torch.randn(2, 7, dims), found.rows, found.columns, torch.randn(7),
                    image, text, torch.tensor(7.0), torch.tensor(2.0), 0.25,
                ]  # fmt: skip
                mine = finish(pairs, arguments, normalize)
                wide = [x.double() if isinstance(x, Tensor) else x for x in arguments]
                exact = finish(reference, wide, normalize)
                for name, value, want in zip(("d_image", "d_text"), mine, exact, strict=True):
                    errors[f"{name} {label}"] = error(value, want)
    return errors


def extremes() -> dict[str, dict[str, tuple[float, float, float]]]:
    """Inputs that one exponential per entry cannot hold: rows, columns, whole tiles far below.

    Ours and the plain path's errors, and the scale.
    """
    cases = {}
    generator = torch.Generator().manual_seed(1)
    axis, noise = torch.randn(2, 48, 64, generator=generator, dtype=torch.float64)
    axis = axis[:1]
    for name in ("opposed", "one row", "one column", "mixed lengths", "huge", "tiny"):
        image = F.normalize(axis + 0.4 * noise, dim=1)
        text = F.normalize(axis + 0.4 * noise.flip(1), dim=1)
        scale = 100.0
        if name == "opposed":
            text = -text
        elif name == "one row":
            image[5] = -image[5]
        elif name == "one column":
            text[11] = -text[11]
        elif name == "mixed lengths":
            image *= torch.logspace(-3, 1.5, 48)[:, None]
            text *= torch.logspace(1, -2, 48)[:, None]
        elif name == "huge":
            image, text, scale = image * 1e4, text * 1e4, 1e6
        else:
            scale = 1e-3
        x, y = image.float(), text.float()
        exact = clip_expected(x.double(), y.double(), scale)
        for kept in (False, True):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            s = torch.tensor(scale, requires_grad=True)
            budget = 1 << 20 if kept else 0
            loss = clip_loss(a, b, s, impl="triton", memory_budget=budget)
            loss.backward()
            results: Any = (loss.detach(), a.grad, b.grad, s.grad)
            plain = _plain(x, y, scale)
            floor = 1e-6 * float(exact.d_image.norm())
            cases[f"{name}{' kept' if kept else ''}"] = {
                field: (error(value, wanted, floor), error(other, wanted, floor), scale)
                for field, value, other, wanted in zip(
                    exact._fields, results, plain, exact[:4], strict=False
                )
            }
    return cases


def _plain(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, ...]:
    """The plain torch path in fp32."""
    leaves = [x.clone().requires_grad_() for x in (image, text, torch.tensor(scale))]
    logits = leaves[2] * leaves[0] @ leaves[1].T
    labels = torch.arange(len(image))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def nan_in_nan_out() -> bool:
    """Whether one broken feature is seen in every result that depends on it."""
    image, text = (x.float() for x in features(20, 8))
    image[3, 2] = float("nan")
    loss = clip_loss(image, text, 10.0, impl="triton")
    other = siglip_loss(image, text, 10.0, -1.0, impl="triton")
    return bool(loss.isnan() and other.isnan())


def most_blocks_alive() -> int:
    """How many blocks of G there are at once, over both losses."""
    alive, most, plain = set[int](), [0], ProductsWithG.add

    def counted(self: ProductsWithG, gradient: Tensor, block: Any) -> None:
        alive.add(id(gradient))
        weakref.finalize(gradient, alive.discard, id(gradient))
        most[0] = max(most[0], len(alive))
        plain(self, gradient, block)

    image, text = (x.float() for x in features(300, 8))
    ones, scale, bias = torch.ones(300), torch.tensor(5.0), torch.tensor(-2.0)
    common = (image, text, scale, (image * text).sum(1), ones, ones)
    blocks: dict[str, Any] = {"block_elements": 128 * 128}
    ProductsWithG.add = counted
    row, column, gap, kept = contrastive.contrastive_statistics(*common, **blocks)
    summary = contrastive.contrastive_summary(row, column, common[3], scale, gap, None)
    contrastive.contrastive_products(*common, *summary[1:], kept, torch.tensor(1.0), **blocks)
    sigmoid.sigmoid_products(image, text, scale, bias, common[3], **blocks)
    ProductsWithG.add = plain
    return most[0]


def operators() -> bool:
    """torch.library's own checks of schema and fake implementation, for each operator."""
    image, text = (x.float() for x in features(9, 6))
    s, b, one = torch.tensor(5.0), torch.tensor(-2.0), torch.tensor(1.0)
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    for impl in ("reference", "triton"):
        for dtype, normalize in ((torch.float32, False), (torch.float16, True)):
            check(prepare_pairs, (image, text, dtype, normalize, impl))
        _, _, product, row_norm, column_norm = prepare_pairs(
            image, text, torch.float32, False, impl
        )
        for ids in (None, torch.arange(9) // 2):
            mine = None if ids is None else ids[2:7]
            counts = None if ids is None else reference.positives_of(ids[2:7], ids)
            stripe = (image[2:7], text, s)
            common = (*stripe, product[2:7], row_norm[2:7], column_norm)
            which = (mine, ids, counts, 9, 2)
            for budget in (0, 1 << 20):
                statistics = (*common, *which, 0.1, budget, impl)
                check(contrastive_statistics, statistics)
                row, column, gap, kept = contrastive_statistics(*statistics)
                target = reference.own_targets(counts, 0.1, gap, 9)
                arguments = (row, column, product, s, gap, target, 9, 2, impl)
                check(contrastive_summary, arguments)
                summary = contrastive_summary(*arguments)
                for need in ((True, True), (True, False), (False, True)):
                    arguments = (*common, *summary[1:], kept, one, *which, 0.1, *need, impl)
                    check(contrastive_products, arguments)
                    if budget == 0:
                        arguments = (*stripe, b, product[2:7], mine, ids, 9, 2, *need, impl)
                        check(sigmoid_products, arguments)
            check(sigmoid_loss, (*stripe, b, mine, ids, 9, 2, impl))
        for need in ((True, True), (True, False), (False, True)):
            for normalize in (False, True):
                check(
                    finish_pairs,
                    (image, text, image, text, product, image, text, s, one, 0.5, normalize,
                     *need, impl),
                )  # fmt: skip
    return True


def compiled() -> dict[str, float]:
    """Both losses inside one graph of torch.compile, against eager."""
    errors = {}
    for kind in ("softmax", "sigmoid"):
        for impl in ("reference", "triton"):

            def step(*leaves: Any, kind: str = kind, impl: Any = impl) -> Tensor:
                x, y, s, b = leaves
                if kind == "softmax":
                    return 2 * clip_loss(x, y, s, normalize=True, impl=impl)
                return 2 * siglip_loss(x, y, s, b, normalize=True, impl=impl)

            results = []
            for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
                leaves = [x.float().requires_grad_() for x in features(9, 6)]
                leaves += [torch.tensor([5.0], requires_grad=True), torch.tensor(-2.0)]
                loss = function(*leaves)
                results.append((loss, *torch.autograd.grad(loss, leaves[:3])))
            errors[f"{kind} {impl}"] = max(
                error(a.detach(), b.detach()) for a, b in zip(*results, strict=True)
            )
    return errors


def main() -> None:
    """Everything, as one JSON object on stdout."""
    torch.manual_seed(0)
    report: dict[str, Any] = {"operators": operators(), "compiled": compiled()}
    _poison()
    report["passes"] = {}
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            image, text = (x.to(dtype) for x in features(shape[1], shape[2]))
            for scale in (1.0, 100.0):
                label = f"{name} {shape} {scale}"
                passes = report["passes"]
                for kept in (False, True) if dtype == torch.float32 else (False,):
                    passes[f"softmax {'kept ' if kept else ''}{label}"] = softmax_passes(
                        image, text, scale, shape, kept
                    )
                passes[f"sigmoid {label}"] = sigmoid_passes(image, text, scale, shape)
    report["pairs"] = prepared()
    report["losses"] = whole_losses()
    report["extremes"] = extremes()
    report["nan"] = nan_in_nan_out()
    report["blocks alive"] = most_blocks_alive()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
