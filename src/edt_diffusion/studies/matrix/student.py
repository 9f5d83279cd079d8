"""Intervals of a mean by Student's t distribution, without scipy."""

import math
from collections.abc import Sequence

import numpy as np

_TINY = 1e-300


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the mean of normal values with probability `level`.

    Args:
        values: at least two.
        level: in (0, 1).
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values: expected at least 2 for an interval")
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
    half = t_quantile(0.5 + level / 2, count - 1) * error
    return mean - half, mean + half


def t_quantile(probability: float, freedom: float) -> float:
    """The value below which Student's t with so many degrees of freedom lies with that probability.

    Args:
        probability: in (0, 1).
        freedom: positive.
    """
    if not 0 < probability < 1 or freedom <= 0:
        raise ValueError(f"probability={probability}, freedom={freedom}: expected (0, 1) and a positive number")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if t_probability(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_probability(value: float, freedom: float) -> float:
    """The probability that Student's t with so many degrees of freedom is below a value."""
    tail = 0.5 * _beta_ratio(freedom / (freedom + value * value), freedom / 2, 0.5)
    return 1 - tail if value >= 0 else tail


def _beta_ratio(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _beta_ratio(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    return front / a * _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction 1 / (1 + d1 / (1 + d2 / ...)), by the modified Lentz method."""
    value = c = _TINY
    d = 0.0
    for number in range(1000):
        m = number // 2
        if number == 0:
            term = 1.0
        elif number % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / ((1.0 + term * d) or _TINY)
        c = (1.0 + term / c) or _TINY
        value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value
