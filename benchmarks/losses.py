"""What both losses' benchmarks share: operands, a step by autograd, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import accuracy
from benchmarks.cases import DTYPES, Case
from benchmarks.harness import Benchmark, Provider
from benchmarks.plan import Variant


class Operands(NamedTuple):
    """What a loss is given; all are leaves that require gradients."""

    image: Tensor
    """[N, D] of the case's dtype."""

    text: Tensor
    """[N, D] of the case's dtype; row i belongs to image i."""

    scale: Tensor
    """fp32 []."""

    bias: Tensor | None
    """fp32 [], of the sigmoid loss."""


class Result(NamedTuple):
    """What a provider computes; gradients by the features as given, None in a forward."""

    loss: Tensor
    d_image: Tensor | None = None
    d_text: Tensor | None = None


Step = Callable[[Operands], Result]
Loss = Callable[..., Tensor]
"""From image and text features, scale and, of the sigmoid loss, bias to the loss, []."""


@dataclass(frozen=True)
class Definition:
    """A loss, apart from who computes it."""

    expected: Callable[[Tensor, Tensor, float, float | None, bool], accuracy.Expected]

    bias: float | None
    """The sigmoid loss's."""

    step_units: int
    """Products of the size of S that TFLOP/s of a step are counted in, whatever is computed."""


CONTRASTIVE = Definition(accuracy.expected_contrastive, bias=None, step_units=4)
SIGMOID = Definition(accuracy.expected_sigmoid, bias=-10.0, step_units=3)
"""The paper's bias at the start of training."""


def benchmark(
    name: str,
    definition: Definition,
    providers: tuple[Provider, ...],
    sets: Mapping[str, tuple[Case, ...]],
    variants: tuple[Variant, ...],
) -> Benchmark:
    """A loss's benchmark; errors are those of `accuracy.errors`."""

    def expected(case: Case, operands: Operands) -> accuracy.Expected | None:
        return expectation(definition, case, operands) if whole(case) else None

    def errors(expected: accuracy.Expected, result: Result) -> Mapping[str, float | None]:
        loss, gradient = accuracy.errors(expected, *result)
        return {"loss_error": loss, "gradient_error": gradient}

    return Benchmark(
        name=name,
        case_type=Case,
        providers=providers,
        sets=sets,
        variants=variants,
        operands=lambda case, device: make_operands(case, definition.bias, device),
        expected=expected,
        errors=errors,
        error_columns=("loss_error", "gradient_error"),
        counted_units=lambda case: definition.step_units if case.part == "step" else 1,
    )


def whole(case: Case) -> bool:
    """Whether a case is all of the matrix, and not one rank's rows."""
    return case.world == 1


def moderate(case: Case) -> bool:
    """Whether S is at most 131,072 × 131,072: larger ones take slow providers minutes a call."""
    return case.rows * case.pairs <= 131_072**2


def expectation(definition: Definition, case: Case, operands: Operands) -> accuracy.Expected:
    """fp64 values for a case's operands."""
    image, text, *_ = operands
    return definition.expected(image, text, case.scale, definition.bias, case.normalize)


def autograd_step(loss: Loss, case: Case, normalizes: bool = False) -> Step:
    """A step from a loss that autograd differentiates.

    Args:
        loss: see `Loss`.
        normalizes: whether it brings features to unit length itself where the case asks for that.
    """

    def forward(operands: Operands) -> Tensor:
        image, text, scale, bias = operands
        if case.normalize and not normalizes:
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        return loss(image, text, scale) if bias is None else loss(image, text, scale, bias)

    def step(operands: Operands) -> Result:
        if case.part == "forward":
            with torch.no_grad():
                return Result(forward(operands))
        value = forward(operands)
        leaves = [leaf for leaf in operands if leaf is not None]
        # Not every peer has a gradient for the scale.
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return Result(value.detach(), gradients[0], gradients[1])

    return step


def make_operands(case: Case, bias: float | None, device: torch.device, seed: int = 0) -> Operands:
    """Random features of a case, the same for every provider on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.pairs, case.dims)
    image = torch.randn(shape, generator=generator, device=device)
    text = torch.randn(shape, generator=generator, device=device).mul_(case.noise).add_(image)
    features = (image, text) if case.normalize else (F.normalize(image), F.normalize(text))
    image, text = (x.to(DTYPES[case.dtype]).requires_grad_() for x in features)
    scale = torch.tensor(case.scale, device=device, requires_grad=True)
    shift = None if bias is None else torch.tensor(bias, device=device, requires_grad=True)
    return Operands(image, text, scale, shift)
