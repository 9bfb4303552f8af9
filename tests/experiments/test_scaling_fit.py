"""Fits of error over compute: known laws are recovered, bands hold what they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import linregress

from fastclip.experiments.scaling_fit import (
    fit_power_law,
    fit_saturating,
    predict_largest,
)

FLOPS = [float(value) for value in np.geomspace(4e12, 1.7e14, 7)]


def _errors(rng: np.random.Generator, noise: float, exponent: float = 0.08) -> list[float]:
    log_error = np.log(0.6) - exponent * np.log(np.asarray(FLOPS) / FLOPS[0])
    return np.exp(log_error + noise * rng.standard_normal(len(FLOPS))).tolist()


def test_a_law_without_noise_is_recovered() -> None:
    fit = fit_power_law(FLOPS, [0.6 * (f / FLOPS[0]) ** -0.08 for f in FLOPS])
    assert fit.exponent == pytest.approx(0.08)
    assert np.exp(fit.intercept) * FLOPS[0] ** -fit.exponent == pytest.approx(0.6)
    assert fit.r_squared == pytest.approx(1)
    assert fit.error(FLOPS[0]) == pytest.approx(0.6)
    np.testing.assert_allclose(fit.residuals, 0, atol=1e-12)


def _linregress(errors: list[float]) -> Any:
    return linregress(np.log(FLOPS), np.log(errors))


def test_equals_scipys_regression() -> None:
    errors = _errors(np.random.default_rng(1), 0.03)
    fit, peer = fit_power_law(FLOPS, errors), _linregress(errors)
    assert fit.exponent == pytest.approx(-peer.slope)
    assert fit.intercept == pytest.approx(peer.intercept)
    assert fit.exponent_error == pytest.approx(peer.stderr)
    assert fit.intercept_error == pytest.approx(peer.intercept_stderr)
    assert fit.r_squared == pytest.approx(peer.rvalue**2)


def test_standard_errors_and_intervals_hold_what_they_promise() -> None:
    """Over 2,000 draws: the exponent's spread, and how often 95 % intervals cover."""
    rng, draws = np.random.default_rng(0), 2000
    exponents, squares, inside, line_inside = [], [], 0, 0
    middle = float(np.sqrt(FLOPS[0] * FLOPS[-1]))
    true = 0.6 * (middle / FLOPS[0]) ** -0.08
    for _ in range(draws):
        errors = _errors(rng, 0.04)
        fit = fit_power_law(FLOPS, errors)
        exponents.append(fit.exponent)
        squares.append(fit.exponent_error**2)
        low, high = fit.confidence_band(middle)
        line_inside += bool(low <= true <= high)
        inside += predict_largest(FLOPS, errors).inside
    assert np.mean(exponents) == pytest.approx(0.08, abs=1e-3)
    assert np.mean(squares) == pytest.approx(np.var(exponents), rel=0.1)
    # The standard deviation of a share around 0.95 is 0.005 here.
    assert inside / draws == pytest.approx(0.95, abs=0.02)
    assert line_inside / draws == pytest.approx(0.95, abs=0.02)


def test_errors_that_do_not_fall_are_told() -> None:
    rng = np.random.default_rng(6)
    assert fit_power_law(FLOPS, _errors(rng, 0.02)).falls
    assert not fit_power_law(FLOPS, _errors(rng, 0.02, exponent=-0.02)).falls
    # The two-sided 95 % interval of a flat law is above 0 once in forty.
    flat = [fit_power_law(FLOPS, _errors(rng, 0.02, exponent=0.0)).falls for _ in range(1000)]
    assert np.mean(flat) == pytest.approx(0.025, abs=0.015)


def test_a_largest_model_off_the_line_is_outside() -> None:
    errors = _errors(np.random.default_rng(2), 0.005)
    held_out = predict_largest(FLOPS, [*errors[:-1], errors[-1] * 1.3])
    assert not held_out.inside
    assert held_out.measured > held_out.high
    assert held_out.predicted == pytest.approx(errors[-1], rel=0.05)
    assert held_out.flops == FLOPS[-1]


def test_the_largest_is_found_by_compute_not_by_place() -> None:
    errors = _errors(np.random.default_rng(3), 0.01)
    forward = predict_largest(FLOPS, errors)
    backward = predict_largest(FLOPS[::-1], errors[::-1])
    assert backward.flops == forward.flops
    assert backward.predicted == pytest.approx(forward.predicted)


def test_a_floor_is_reported_when_the_data_have_one() -> None:
    x = np.geomspace(1e12, 1e15, 9)
    noise = np.exp(0.003 * np.random.default_rng(4).standard_normal(9))
    with_floor = ((0.3 + 0.5 * (x / 1e12) ** -0.4) * noise).tolist()
    found = fit_saturating(x.tolist(), with_floor)
    assert found.supported
    assert found.floor == pytest.approx(0.3, abs=0.01)
    assert found.exponent == pytest.approx(0.4, abs=0.03)
    assert found.coefficient * 1e12**-found.exponent == pytest.approx(0.5, abs=0.02)


def test_no_floor_is_forced_on_a_power_law() -> None:
    rng = np.random.default_rng(5)
    supported = [fit_saturating(FLOPS, _errors(rng, 0.02)).supported for _ in range(25)]
    assert np.mean(supported) < 0.1


@pytest.mark.parametrize(
    ("flops", "errors", "message"),
    [
        (FLOPS[:2], [0.5, 0.4], "at least 3 models, not 2"),
        ([1e12] * 3, [0.5, 0.4, 0.3], r"same compute, 1e\+12 FLOP"),
        (FLOPS[:3], [0.5, 0.0, 0.3], r"model 2 \(.*\): an error of 0 "),
        (FLOPS[:3], [1.0, 0.4, 0.3], r"model 1 \(.*\): an error of 1 "),
        (FLOPS[:3], [0.5, float("nan"), 0.3], "model 2 .*an error of nan"),
        ([0.0, 1.0, 2.0], [0.5, 0.4, 0.3], "model 1: its compute is more than 0"),
        (FLOPS[:3], [0.5, 0.4], "no pairs"),
    ],
)
def test_what_has_no_line(flops: list[float], errors: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_power_law(flops, errors)


def test_what_is_too_little() -> None:
    with pytest.raises(ValueError, match="at least 4, not 3"):
        predict_largest(FLOPS[:3], [0.5, 0.4, 0.3])
    with pytest.raises(ValueError, match="6 models or more, not 5"):
        fit_saturating(FLOPS[:5], [0.5, 0.4, 0.3, 0.2, 0.1])
