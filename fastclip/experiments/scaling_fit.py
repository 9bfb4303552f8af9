"""Error against compute on logarithmic axes: a line, how sure it is, and what it predicts.

The line is log(error) = a - b·log(FLOP), by least squares over one point per model (arXiv
2103.00020, Figure 9). Its bands are the usual ones of linear regression, with Student's t: few
models make them wide, and they say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastclip.eval.intervals import t_quantile

Floats = NDArray[np.float64]

FEWEST_FOR_FLOOR = 6
"""Models from which AICc is defined for the three parameters of a floor and the variance."""

_FLOORS = (0.0, 0.3, 0.6, 0.9, 0.99)
"""Where the search for a floor begins, over the smallest error."""


@dataclass(frozen=True)
class PowerLaw:
    """log(error) = `intercept` - `exponent`·log(FLOP), natural logarithms."""

    intercept: float
    exponent: float
    intercept_error: float
    """Standard error; at one FLOP, far from the data, and thus large."""
    exponent_error: float
    """Standard error."""
    deviation: float
    """Standard deviation of the residuals, with two degrees of freedom taken off."""
    r_squared: float
    residuals: tuple[float, ...]
    """log(measured) - log(fitted), in the order of the points."""
    log_flops_mean: float
    log_flops_spread: float
    """Sum of squares around the mean."""

    @property
    def degrees(self) -> int:
        """Degrees of freedom that are left."""
        return len(self.residuals) - 2

    @property
    def falls(self) -> bool:
        """Whether errors fall with compute: the exponent's 95 % interval is above 0."""
        return self.exponent > t_quantile(0.95, self.degrees) * self.exponent_error

    def error(self, flops: Floats | float) -> Floats:
        """The line, at `flops` of any shape."""
        return np.exp(self.intercept - self.exponent * np.log(np.asarray(flops, np.float64)))

    def confidence_band(self, flops: Floats | float, level: float = 0.95) -> tuple[Floats, Floats]:
        """Where the line itself lies, pointwise: lower and upper error."""
        return self._band(flops, level, 0.0)

    def prediction_band(self, flops: Floats | float, level: float = 0.95) -> tuple[Floats, Floats]:
        """Where the error of one further model would lie: lower and upper error."""
        return self._band(flops, level, 1.0)

    def _band(self, flops: Floats | float, level: float, own: float) -> tuple[Floats, Floats]:
        distance = np.log(np.asarray(flops, np.float64)) - self.log_flops_mean
        variance = own + 1 / len(self.residuals) + distance**2 / self.log_flops_spread
        factor = np.exp(t_quantile(level, self.degrees) * self.deviation * np.sqrt(variance))
        line = self.error(flops)
        return line / factor, line * factor


@dataclass(frozen=True)
class HeldOut:
    """The largest model, as all the others predict it."""

    fit: PowerLaw
    """Of all models but the largest."""
    flops: float
    measured: float
    predicted: float
    low: float
    """Lower end of the 95 % prediction interval."""
    high: float

    @property
    def inside(self) -> bool:
        """Whether the measured error lies in the interval."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Saturating:
    """error = `floor` + `coefficient`·FLOP^-`exponent`, and how it compares with a power law."""

    floor: float
    coefficient: float
    exponent: float
    aicc: float
    power_law_aicc: float

    @property
    def supported(self) -> bool:
        """Whether the data ask for a floor: its AICc is lower by 2 and more."""
        return self.power_law_aicc - self.aicc >= 2


def fit_power_law(flops: Sequence[float], errors: Sequence[float]) -> PowerLaw:
    """The line through log(error) over log(FLOP), one point per model.

    Args:
        flops: training compute of each model, in FLOP.
        errors: shares of wrong answers, in (0, 1).

    Raises:
        ValueError: fewer than three points, an error of 0 or 1, or one compute alone.
    """
    x, y = _logarithms(flops, errors)
    if len(x) < 3:
        raise ValueError(f"a line and its uncertainty need at least 3 models, not {len(x)}")
    spread = float(((x - x.mean()) ** 2).sum())
    if spread < 1e-6:
        raise ValueError(
            f"all {len(x)} models have the same compute, {flops[0]:.3g} FLOP: a slope needs "
            "models of different sizes"
        )
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    intercept = float(y.mean() - slope * x.mean())
    residuals = y - intercept - slope * x
    squares = float((residuals**2).sum())
    deviation = math.sqrt(squares / (len(x) - 2))
    total = float(((y - y.mean()) ** 2).sum())
    return PowerLaw(
        intercept=intercept,
        exponent=-slope,
        intercept_error=deviation * math.sqrt(1 / len(x) + float(x.mean()) ** 2 / spread),
        exponent_error=deviation / math.sqrt(spread),
        deviation=deviation,
        r_squared=1 - squares / total if total > 0 else 0.0,
        residuals=tuple(residuals.tolist()),
        log_flops_mean=float(x.mean()),
        log_flops_spread=spread,
    )


def predict_largest(flops: Sequence[float], errors: Sequence[float]) -> HeldOut:
    """Fit on all models but that of most compute, and compare it with its prediction.

    Raises:
        ValueError: fewer than four models, or see `fit_power_law`.
    """
    if len(flops) < 4:
        raise ValueError(
            f"to predict the largest model from the others needs at least 4, not {len(flops)}"
        )
    largest = int(np.argmax(flops))
    others = [place for place in range(len(flops)) if place != largest]
    _logarithms(flops, errors)
    fit = fit_power_law([flops[i] for i in others], [errors[i] for i in others])
    low, high = fit.prediction_band(flops[largest])
    return HeldOut(
        fit=fit,
        flops=flops[largest],
        measured=errors[largest],
        predicted=float(fit.error(flops[largest])),
        low=float(low),
        high=float(high),
    )


def fit_saturating(flops: Sequence[float], errors: Sequence[float]) -> Saturating:
    """A power law above a floor, by least squares of the same logarithms as the line's.

    The floor is between 0 and the smallest error. AICc counts the variance as a parameter.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: fewer than six models, or see `fit_power_law`.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise ImportError(
            "a fit with a floor needs SciPy: pip install 'fastclip-torch[eval]'"
        ) from None
    if len(flops) < FEWEST_FOR_FLOOR:
        raise ValueError(
            f"whether errors end at a floor can be asked of {FEWEST_FOR_FLOOR} models or more, "
            f"not {len(flops)}"
        )
    line = fit_power_law(flops, errors)
    x, y = _logarithms(flops, errors)
    centred, smallest = x - x.mean(), float(np.exp(y).min())

    def residuals(values: Floats) -> Floats:
        floor, height, exponent = values
        return y - np.log(floor + np.exp(height - exponent * centred))

    best = None
    for share in _FLOORS:
        floor = share * smallest
        rest = np.log(np.exp(y) - floor)
        slope = float((centred * rest).sum() / (centred**2).sum())
        start = [floor, float(rest.mean()), max(-slope, 1e-6)]
        bounds = ([0.0, -np.inf, 0.0], [smallest, np.inf, np.inf])
        found = least_squares(residuals, start, bounds=bounds, x_scale="jac")
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    floor, height, exponent = (float(value) for value in best.x)
    return Saturating(
        floor=floor,
        coefficient=math.exp(height + exponent * float(x.mean())),
        exponent=exponent,
        aicc=_aicc(2 * float(best.cost), len(x), 4),
        power_law_aicc=_aicc(sum(r * r for r in line.residuals), len(x), 3),
    )


def _aicc(squares: float, points: int, parameters: int) -> float:
    """Akaike's criterion of normal residuals, corrected for few points."""
    fit = points * math.log(max(squares, 1e-300) / points)
    return fit + 2 * parameters * points / (points - parameters - 1)


def _logarithms(flops: Sequence[float], errors: Sequence[float]) -> tuple[Floats, Floats]:
    if len(flops) != len(errors):
        raise ValueError(f"{len(flops)} computes and {len(errors)} errors are no pairs")
    for number, (compute, error) in enumerate(zip(flops, errors, strict=True), start=1):
        if not 0 < compute < math.inf:
            raise ValueError(f"model {number}: its compute is more than 0 FLOP, not {compute}")
        if not 0 < error < 1:
            raise ValueError(
                f"model {number} ({compute:.3g} FLOP): an error of {error:g} has no place on a "
                "logarithmic axis or says nothing; take harder or easier tasks, or leave it out"
            )
    return np.log(np.asarray(flops, np.float64)), np.log(np.asarray(errors, np.float64))
