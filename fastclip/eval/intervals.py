"""How sure numbers are: of counted successes, exactly, and of means, by Student's t."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def clopper_pearson(
    successes: int, trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """The exact two-sided interval of a probability (Clopper and Pearson, 1934).

    Args:
        successes: of the trials.
        confidence: probability, at least, with which such intervals hold the truth.

    Raises:
        ImportError: scipy is not installed.
        ValueError: the numbers contradict each other.
    """
    _check(successes, trials)
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence lies between 0 and 1, not {confidence}")
    beta = _scipy_stats().beta
    tail = (1 - confidence) / 2
    failures = trials - successes
    low = float(beta.ppf(tail, successes, failures + 1)) if successes else 0.0
    high = float(beta.isf(tail, successes + 1, failures)) if failures else 1.0
    return low, high


def binomial_p_value(successes: int, trials: int, null: float) -> float:
    """Probability of at least so many successes if each had the probability `null`; one-tailed.

    Raises:
        ImportError: scipy is not installed.
        ValueError: the numbers contradict each other.
    """
    _check(successes, trials)
    if not 0 <= null <= 1:
        raise ValueError(f"a probability lies between 0 and 1, not {null}")
    return float(_scipy_stats().binom.sf(successes - 1, trials, null))


def t_quantile(level: float, degrees: int) -> float:
    """Student's t that holds the share `level` between minus and plus it.

    Raises:
        ImportError: scipy is not installed.
    """
    return float(_scipy_stats().t.ppf((1 + level) / 2, degrees))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of the 95 % interval of a mean of at least two values, by Student's t.

    Raises:
        ImportError: scipy is not installed.
    """
    reach = t_quantile(0.95, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


def _check(successes: int, trials: int) -> None:
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials are none")


def _scipy_stats() -> Any:
    try:
        import scipy.stats
    except ImportError:
        raise ImportError(
            "intervals and tests are computed by scipy: pip install 'fastclip-torch[eval]'"
        ) from None
    return scipy.stats
