"""The accuracy gate: a paired non-inferiority test of a compiled model against PyTorch on the same examples.

The model passes when the upper confidence bound of its drop in accuracy is within the budget, fails when the lower
bound is beyond it, and is inconclusive otherwise. "No significant difference" is never read as "equal".
"""

from collections.abc import Callable
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np

from bundle import metrics
from bundle.manifest import GateRecord, Verdict


def judge(
    truth: np.ndarray, reference: np.ndarray, candidate: np.ndarray, *, budget: float, confidence: float = 0.95
) -> GateRecord:
    """Compare predicted labels example by example.

    Args:
        truth: int (N,) true labels.
        reference: int (N,) labels predicted in PyTorch.
        candidate: int (N,) labels predicted by the compiled model.
        budget: largest drop in accuracy that passes, a fraction.
        confidence: of each one-sided bound.
    """
    n = len(truth)
    right, right_now = reference == truth, candidate == truth
    lost, won = int(np.sum(right & ~right_now)), int(np.sum(~right & right_now))
    lower, upper = drop_bounds(lost, won, n, confidence)
    verdict: Verdict = "PASS" if upper <= budget else "FAIL" if lower > budget else "INCONCLUSIVE"
    return GateRecord(
        verdict=verdict,
        metric="accuracy",
        examples=n,
        reference=metrics.accuracy(truth, reference),
        served=metrics.accuracy(truth, candidate),
        drop=(lost - won) / n,
        drop_upper=upper,
        budget=budget,
        confidence=confidence,
        disagreement=float(np.mean(reference != candidate)),
        examples_needed=examples_needed(lost, won, n, budget, confidence) if verdict == "INCONCLUSIVE" else None,
    )


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
    """The fewest examples with which any candidate can pass a budget."""
    z = NormalDist().inv_cdf(confidence)
    return ceil(z * z * (1 - budget) / budget)
