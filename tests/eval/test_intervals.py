"""Exact intervals and tests against sums of binomial terms."""

from __future__ import annotations

import math

import pytest

from fastclip.eval.intervals import binomial_p_value, clopper_pearson

pytest.importorskip("scipy")


def _at_least(successes: int, trials: int, probability: float) -> float:
    return math.fsum(
        math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k)
        for k in range(successes, trials + 1)
    )


@pytest.mark.parametrize(("successes", "trials"), [(1, 5), (7, 20), (19, 20), (40, 300)])
@pytest.mark.parametrize("confidence", [0.95, 0.995])
def test_an_interval_ends_where_a_tail_is_half_of_the_rest(
    successes: int, trials: int, confidence: float
) -> None:
    low, high = clopper_pearson(successes, trials, confidence=confidence)
    tail = (1 - confidence) / 2
    assert low < successes / trials < high
    assert _at_least(successes, trials, low) == pytest.approx(tail, rel=1e-6)
    assert 1 - _at_least(successes + 1, trials, high) == pytest.approx(tail, rel=1e-6)


def test_intervals_of_none_and_all() -> None:
    assert clopper_pearson(0, 10) == pytest.approx((0, 1 - 0.025**0.1))
    assert clopper_pearson(10, 10) == pytest.approx((0.025**0.1, 1))


@pytest.mark.parametrize(("successes", "null"), [(0, 0.3), (3, 0.3), (9, 0.3), (12, 0.3), (12, 1)])
def test_p_value_is_the_upper_tail(successes: int, null: float) -> None:
    assert binomial_p_value(successes, 12, null) == pytest.approx(_at_least(successes, 12, null))


def test_numbers_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="5 successes of 4 trials"):
        clopper_pearson(5, 4)
    with pytest.raises(ValueError, match="0 successes of 0 trials"):
        binomial_p_value(0, 0, 0.5)
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        binomial_p_value(1, 2, 1.5)
    with pytest.raises(ValueError, match="between 0 and 1, not 95"):
        clopper_pearson(1, 2, confidence=95)
