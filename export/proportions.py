"""Confidence bounds of fractions: of the drop between two paired ones by a score interval, of one alone exactly."""

from collections.abc import Callable
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np


def drop_bounds(lost: float, won: float, n: float, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper confidence bounds of the drop in accuracy, by Tango's score interval.

    T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998) 891-908. It keeps its level where few or no examples changed sides: with
    none of n, the upper bound is z² / (n + z²).

    Args:
        lost: examples that only the reference got right.
        won: examples that only the candidate got right.
        n: all examples.
        confidence: of each bound by itself.
    """
    z = NormalDist().inv_cdf(confidence)
    observed = (lost - won) / n

    def score(drop: float) -> float:
        b = (2 * n - lost + won) * drop - lost - won
        c = -won * drop * (1 - drop)
        won_rate = (sqrt(max(b * b - 8 * n * c, 0)) - b) / (4 * n)  # most likely, were the true drop `drop`
        variance = n * (2 * won_rate + drop * (1 - drop))
        return (lost - won - n * drop) / sqrt(variance) if variance > 0 else 0.0

    upper = _first(lambda drop: score(drop) <= -z, observed, 1.0)
    lower = -_first(lambda drop: score(-drop) >= z, -observed, 1.0)
    return lower, upper


def _first(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest value between low and high where a monotone condition holds, from above, to 1e-12."""
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def examples_needed(lost: int, won: int, n: int, budget: float, confidence: float = 0.95) -> int | None:
    """How many examples would decide if both rates of change stay as seen; None at the budget, where none would."""
    passing = (lost - won) / n < budget

    def decided(total: float) -> bool:
        lower, upper = drop_bounds(lost * total / n, won * total / n, total, confidence)
        return upper <= budget if passing else lower > budget

    most = n * 1_000_000
    if not decided(most):
        return None
    few, many = n, 2 * n
    while not decided(many):
        few, many = many, 2 * many
    while many - few > max(1, few // 1000):
        middle = (few + many) // 2
        few, many = (few, middle) if decided(middle) else (middle, many)
    return many


def best_certifiable(n: int, confidence: float = 0.95) -> float:
    """The smallest drop that n examples can rule out: that of a candidate which changes no answer."""
    return drop_bounds(0, 0, n, confidence)[1]


def fewest_examples(budget: float, confidence: float = 0.95) -> int:
    """The fewest examples with which a candidate that changes no answer can pass a budget, which is more than 0."""
    z = NormalDist().inv_cdf(confidence)
    return ceil(z * z * (1 - budget) / budget)


def fraction_upper(found: int, n: int, confidence: float) -> float:
    """The one-sided upper confidence bound of a fraction of which `found` of n were seen.

    C. J. Clopper and E. S. Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial,
    Biometrika 26 (1934) 404-413: the fraction with which so few are seen in one of 1 / (1 - confidence) cases. It keeps
    its level for every n; of none in n it is about 3 / n.
    """
    if found >= n:
        return 1.0
    seen = np.arange(found + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((n - seen[1:] + 1) / seen[1:]))])  # logarithms of binomials

    def rare(fraction: float) -> bool:
        logs = ways + seen * np.log(fraction) + (n - seen) * np.log1p(-fraction)
        return bool(np.exp(logs).sum() <= 1 - confidence)

    return _first(rare, found / n, 1.0)
