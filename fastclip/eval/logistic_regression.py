"""Logistic regression by L-BFGS, to the optimum: what linear probes and few-shot curves train.

The objective is that of scikit-learn's ``LogisticRegression(C=1 / strength)``,

    Σᵢ loss(xᵢ W + b, yᵢ) + strength / 2 · ‖W‖²,

with biases b that are not penalised: softmax cross-entropy over three classes or more, one logistic
loss for two classes, and one per class (one-vs-rest) where an image may have several.

Features of CLIP are far from round: some directions vary a hundred times as much as others, about a
mean that is larger still. L-BFGS alone then needs hundreds of iterations. Here features are
centred, which the biases make up for, and turned into their principal axes; there the curvature at
the classes' frequencies is known, c(1 − c) s² + strength for an axis with singular value s and a
class of frequency c, and every weight is measured in its inverse square root. The optimum is the
same, some tens of iterations away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_SCORES = 2**23  # scores in memory at once: 32 MiB, and as much for their exponentials
_HISTORY = 10  # as scipy, and so scikit-learn, has it
_LINE_STEPS = 30
_NEGLIGIBLE = 1e-30


@dataclass(frozen=True)
class Classifier:
    """A fitted logistic regression, in the coordinates of the features."""

    weight: Tensor
    """fp64 [W, C]; its rows sum to 0 where classes exclude each other."""

    bias: Tensor
    """fp64 [C]; ∓inf for a class that no training example has, or, one-vs-rest, that all have."""

    exclusive: bool
    """Whether an image has exactly one class."""

    iterations: int

    converged: bool
    """Whether the gradient has vanished as asked within the iterations."""

    def scores(self, features: Tensor) -> Tensor:
        """Logits fp32 [N, C] of features [N, W]."""
        return (features.double() @ self.weight + self.bias).float()

    def probabilities(self, features: Tensor) -> Tensor:
        """fp32 [N, C]; rows sum to 1 where classes exclude each other."""
        scores = features.double() @ self.weight + self.bias
        return (scores.softmax(dim=1) if self.exclusive else scores.sigmoid()).float()


class LogisticRegression:
    """Fits of one training set, for any number of strengths; preparing it is shared by all.

    Args:
        features: floating point [N, W], on the device where the work is done.
        labels: int64 [N], or bool [N, C] where an image may have several classes.
        classes: C; labels below it that do not occur get a score of −inf.

    Raises:
        ValueError: shapes, dtypes or values that do not fit; fewer than two classes occur.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        check_examples(features, labels, classes)
        counts = class_counts(labels, classes)
        self.exclusive = labels.ndim == 1
        self.classes = classes
        self._examples = len(labels)
        if self.exclusive:
            self._fitted = (counts > 0).nonzero()[:, 0]
            self._constant = torch.where(counts > 0, 0.0, -torch.inf).double()
            if len(self._fitted) < 2:
                raise ValueError(
                    f"a classifier needs examples of two classes; {len(labels)} example(s) show "
                    f"{len(self._fitted)}"
                )
        else:
            some, all_of_them = counts > 0, counts == len(labels)
            self._fitted = (some & ~all_of_them).nonzero()[:, 0]
            self._constant = torch.zeros_like(counts, dtype=torch.float64)
            self._constant[~some], self._constant[all_of_them] = -torch.inf, torch.inf
            if not len(self._fitted):
                raise ValueError("no class has both images that show it and images that do not")
        self.absent = tuple((counts == 0).nonzero()[:, 0].tolist())
        """Classes without an example."""
        frequency = counts[self._fitted].double() / len(labels)
        # Two classes that exclude each other are one column: as in scikit-learn, the penalty is on
        # their difference.
        self._softmax = self.exclusive and len(self._fitted) > 2
        if self.exclusive:
            self._target = torch.searchsorted(self._fitted, labels)
            if not self._softmax:
                self._target, frequency = self._target[:, None] == 1, frequency[1:]
        else:
            self._target = labels[:, self._fitted]
        self._curvature = frequency * (1 - frequency)
        wide = features.double()
        self._mean = wide.mean(dim=0)
        wide = wide - self._mean
        # Weights at the optimum lie in the span of the features: fewer examples, fewer unknowns.
        basis = torch.linalg.qr(wide.T)[0] if wide.shape[0] < wide.shape[1] else None
        wide = wide if basis is None else wide @ basis
        squares, axes = torch.linalg.eigh(wide.T @ wide)
        self._squares = squares.clamp(min=0)
        self._axes = axes if basis is None else basis @ axes
        self._rotated = (wide @ axes).float()

    def fit(
        self,
        strength: float,
        *,
        start: Classifier | None = None,
        tolerance: float = 1e-5,
        max_iterations: int = 1000,
    ) -> Classifier:
        """The optimum for one strength of the penalty.

        Args:
            strength: λ > 0.
            start: of the same classes, for a strength nearby: spares iterations.
            tolerance: bound of the norm of the gradient by the scaled weights, relative to the
                objective's mean over examples or, if that is smaller, to the norm where all weights
                are zero.
            max_iterations: of L-BFGS.
        """
        if not strength > 0.0 or not math.isfinite(strength):
            raise ValueError(f"the penalty's strength is finite and positive, not {strength}")
        count = self._examples
        scale = torch.cat(
            [
                (count / (self._squares[:, None] * self._curvature + strength)).sqrt(),
                self._curvature.rsqrt()[None],
            ]
        )

        def slope(x: Tensor) -> tuple[float, Tensor]:
            weights = x * scale
            loss, gradient = self._loss(weights)
            gradient[:-1] += strength * weights[:-1]
            loss += 0.5 * strength * float(weights[:-1].square().sum())
            return loss / count, gradient * scale / count

        level = float(slope(torch.zeros_like(scale))[1].norm())
        x = torch.zeros_like(scale) if start is None else self._enter(start) / scale
        x, iterations, converged = minimise_convex(
            slope,
            x,
            converged=lambda loss, gradient: gradient <= tolerance * min(loss, level),
            max_iterations=max_iterations,
        )
        return self._leave(x * scale, iterations, converged)

    def _loss(self, weights: Tensor) -> tuple[float, Tensor]:
        """Sum of the losses, and its gradient fp64 [r + 1, columns], the bias's last.

        Products run in fp32.
        """
        weight, bias = weights[:-1].float(), weights[-1].float()
        rows = max(1, _CHUNK_SCORES // weights.shape[1])
        slopes = softmax_slopes if self._softmax else sigmoid_slopes
        loss, gradient = 0.0, torch.zeros_like(weights)
        for begin in range(0, self._examples, rows):
            part = self._rotated[begin : begin + rows]
            target = self._target[begin : begin + rows]
            losses, residual = slopes(torch.addmm(bias, part, weight), target)
            loss += float(losses.sum(dtype=torch.float64))
            gradient[:-1] += part.T @ residual
            gradient[-1] += residual.sum(dim=0, dtype=torch.float64)
        return loss, gradient

    def _enter(self, start: Classifier) -> Tensor:
        """A classifier's weights and biases as unknowns of this one."""
        weight, bias = start.weight[:, self._fitted], start.bias[self._fitted]
        bias = bias + self._mean @ weight
        unknowns = torch.cat([self._axes.T @ weight, bias[None]]).nan_to_num(0.0, 0.0, 0.0)
        if self.exclusive and not self._softmax:
            return unknowns[:, 1:] - unknowns[:, :1]
        return unknowns

    def _leave(self, unknowns: Tensor, iterations: int, converged: bool) -> Classifier:
        if self.exclusive and not self._softmax:
            unknowns = torch.cat([-unknowns / 2, unknowns / 2], dim=1)
        elif self.exclusive:
            # The softmax does not see a common part; the penalty leaves it in the biases alone.
            unknowns = unknowns - unknowns.mean(dim=1, keepdim=True)
        fitted = self._axes @ unknowns[:-1]
        weight = fitted.new_zeros(len(fitted), self.classes)
        weight[:, self._fitted] = fitted
        bias = self._constant.clone()
        bias[self._fitted] = unknowns[-1] - self._mean @ fitted
        return Classifier(weight, bias, self.exclusive, iterations, converged)


def minimise_convex(
    slope: Callable[[Tensor], tuple[float, Tensor]],
    x: Tensor,
    *,
    converged: Callable[[float, float], bool],
    max_iterations: int,
) -> tuple[Tensor, int, bool]:
    """Minimise a smooth convex function by L-BFGS (Liu and Nocedal, 1989).

    The line search looks at slopes alone, which a convex function allows: where they change their
    sign the minimum lies between. Values would drown in rounding long before slopes do.

    Args:
        slope: from x to the function's value and its gradient.
        x: where to begin.
        converged: from value and norm of the gradient to whether that is the end.
        max_iterations: directions that are followed.

    Returns:
        x, the iterations, and whether it has converged; not, too, where rounding lets no direction
        descend any more.
    """
    value, gradient = slope(x)
    steps: list[tuple[Tensor, Tensor, float]] = []
    for iteration in range(max_iterations):
        if converged(value, float(gradient.norm())):
            return x, iteration, True
        direction = -_times_inverse(steps, gradient)
        descent = float((gradient * direction).sum())
        low, high, length = 0.0, math.inf, 1.0
        for _ in range(_LINE_STEPS):
            next_x = x + length * direction
            next_value, next_gradient = slope(next_x)
            along = float((next_gradient * direction).sum())
            # Hager and Zhang's approximate Wolfe conditions (2005), with δ = 0.1 and σ = 0.9.
            if along < 0.9 * descent:
                low = length
            elif along > -0.8 * descent:
                high = length
            else:
                break
            length = 4.0 * length if math.isinf(high) else (low + high) / 2
        else:
            if not steps:
                return x, iteration, False
            steps = []  # once more, along the gradient itself
            continue
        step, change = next_x - x, next_gradient - gradient
        curvature = float((step * change).sum())
        if curvature > 0.0:
            steps = [*steps[1 - _HISTORY :], (step, change, curvature)]
        x, value, gradient = next_x, next_value, next_gradient
    return x, max_iterations, converged(value, float(gradient.norm()))


def _times_inverse(steps: list[tuple[Tensor, Tensor, float]], gradient: Tensor) -> Tensor:
    """The approximate inverse Hessian of the last steps times the gradient."""
    result = gradient.clone()
    shares = []
    for step, change, curvature in reversed(steps):
        share = float((step * result).sum()) / curvature
        result -= share * change
        shares.append(share)
    if steps:
        _, change, curvature = steps[-1]
        result *= curvature / float(change.square().sum())
    for (step, change, curvature), share in zip(steps, reversed(shares), strict=True):
        result += (share - float((change * result).sum()) / curvature) * step
    return result


def softmax_slopes(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies fp64 [N, 1] of scores fp32 [N, C] and classes int64 [N], and their slopes.

    The slopes, probabilities less one at the target, keep their relative precision where they
    vanish: the target's is minus the sum of the others, not a difference from 1. See `_flushed`.
    """
    place = target[:, None]
    slopes = scores.softmax(dim=1)
    right = slopes.gather(1, place).double()
    others = slopes.scatter_(1, place, 0.0).sum(dim=1, keepdim=True)
    slopes.scatter_(1, place, -others)
    wrong = others.double()
    losses = torch.where(wrong < 0.5, -torch.log1p(-wrong), -right.log())
    far = right < _NEGLIGIBLE  # underflow takes digits first: the logarithm is in the scores
    if bool(far.any()):
        exact = scores.logsumexp(dim=1, keepdim=True) - scores.gather(1, place)
        losses = torch.where(far, exact.double(), losses)
    return losses, _flushed(slopes)


def sigmoid_slopes(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic losses fp32 [N, C] of scores and bool targets [N, C], and their slopes, likewise."""
    against = torch.where(target, -scores, scores)
    wrong = against.sigmoid()
    return F.softplus(against), _flushed(torch.where(target, -wrong, wrong))


def _flushed(slopes: Tensor) -> Tensor:
    """Slopes without those that no optimum depends on.

    Where penalties are weak most are subnormal, and so are their products with features: a CPU
    takes many times as long for sums of them.
    """
    return F.hardshrink(slopes, _NEGLIGIBLE)


def check_examples(features: Tensor, labels: Tensor, classes: int) -> None:
    """Raise ValueError unless these are features [N, W] with labels of `classes` classes."""
    if features.ndim != 2 or not features.is_floating_point() or not len(features):
        raise ValueError(
            f"features are floating point [images, width] with at least one image, not "
            f"{features.dtype} {list(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features hold numbers that are not finite: the model is broken")
    several = labels.dtype == torch.bool
    shape = (len(features), classes) if several else (len(features),)
    if labels.dtype not in (torch.int64, torch.bool) or labels.shape != shape:
        raise ValueError(
            f"labels of {len(features)} images are int64 [{len(features)}], or bool "
            f"[{len(features)}, {classes}], not {labels.dtype} {list(labels.shape)}"
        )
    if not several and not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"labels are places among {classes} classes, from 0 on")


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Examples of each class, int64 [C]."""
    return labels.sum(dim=0) if labels.ndim == 2 else torch.bincount(labels, minlength=classes)
