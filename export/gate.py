"""The accuracy gate: a paired non-inferiority test of a compiled model against PyTorch on the same examples.

The model passes when the upper confidence bound of its drop is within the budget, fails when the lower bound is beyond
it, and is inconclusive otherwise. "No significant difference" is never read as "equal". Of several tasks each is judged
by itself, and all must pass: a model that is beyond the budget in one task passes no more often than in that task.
"""

from collections.abc import Callable, Sequence
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np

from bundle.manifest import GateRecord, Regression, Task, Verdict
from finetune.evaluate import predictions
from finetune.target import Target, columns

RESAMPLES = 10_000
RESAMPLED_NUMBERS = 4_000_000  # at a time
FEWEST_RESAMPLED = 50  # examples; with fewer the bootstrap does not keep its level, and nothing passes


def judge_tasks(
    tasks: Sequence[Task], targets: Sequence[Target], reference: np.ndarray, candidate: np.ndarray, *, budget: float
) -> tuple[GateRecord, ...]:
    """Compare the logits of two models, task by task, each on the examples whose truth is known.

    Args:
        tasks: whose logits they are.
        targets: the truth of N examples, one column for each task, some of it known in each.
        reference: float32 (N, columns of all tasks), of PyTorch.
        candidate: the same, of the compiled model.
        budget: largest drop that passes: of a fraction of right answers, or relative to the reference's RMSE.
    """
    records = []
    for task, target, part in zip(tasks, targets, columns(tasks), strict=True):
        known = target.known
        truth = target.values[known]
        answers = [predictions(task, logits[known, part]) for logits in (reference, candidate)]
        judged = judge_regression if isinstance(task, Regression) else judge
        name = task.name if len(tasks) > 1 else None
        records.append(judged(truth, *answers, budget=budget, task=name))
    return tuple(records)


def closest(records: Sequence[GateRecord]) -> GateRecord:
    """The record of the task that came closest to failing, or failed by most."""
    order: tuple[Verdict, ...] = ("PASS", "INCONCLUSIVE", "FAIL")
    return max(records, key=lambda record: (order.index(record.verdict), record.drop_upper - record.budget))


def judge(
    truth: np.ndarray,
    reference: np.ndarray,
    candidate: np.ndarray,
    *,
    budget: float,
    confidence: float = 0.95,
    task: str | None = None,
) -> GateRecord:
    """Compare predicted labels example by example: the drop is that of the fraction of right answers.

    Args:
        truth: true labels, int (N,); of a multilabel task 0 or 1, (N, C), an answer being right when its row is.
        reference: labels predicted in PyTorch, of the same shape.
        candidate: labels predicted by the compiled model.
        budget: largest drop that passes, a fraction.
        confidence: of each one-sided bound.
        task: its name, when there are several.
    """
    n = len(truth)
    right, right_now = _same(reference, truth), _same(candidate, truth)
    lost, won = int(np.sum(right & ~right_now)), int(np.sum(~right & right_now))
    lower, upper = drop_bounds(lost, won, n, confidence)
    verdict = _verdict(lower, upper, budget)
    return GateRecord(
        verdict=verdict,
        task=task,
        metric="accuracy" if truth.ndim == 1 else "exact_match",
        examples=n,
        reference=float(np.mean(right)),
        served=float(np.mean(right_now)),
        drop=(lost - won) / n,
        drop_upper=upper,
        budget=budget,
        confidence=confidence,
        disagreement=float(np.mean(~_same(reference, candidate))),
        examples_needed=examples_needed(lost, won, n, budget, confidence) if verdict == "INCONCLUSIVE" else None,
    )


def judge_regression(
    truth: np.ndarray,
    reference: np.ndarray,
    candidate: np.ndarray,
    *,
    budget: float,
    confidence: float = 0.95,
    task: str | None = None,
) -> GateRecord:
    """Compare predicted values example by example: the drop is the relative increase of the RMSE.

    Args:
        truth: true values, float (N,).
        reference: values predicted in PyTorch.
        candidate: values predicted by the compiled model.
        budget: largest relative increase that passes; 0.01 allows an RMSE of 1.01 times the reference's.
        confidence: of each one-sided bound.
        task: its name, when there are several.

    Returns:
        `reference` and `served` are RMSEs in the target's units, `drop` and `drop_upper` relative increases, and
        `disagreement` is the fraction of values that differ at all.
    """
    before, after = (np.square(answers.astype(np.float64) - truth) for answers in (reference, candidate))
    increase = float(_increase(before.mean(), after.mean()))
    lower, upper = increase_bounds(before, after, confidence)
    verdict = _verdict(lower, upper, budget) if len(truth) >= FEWEST_RESAMPLED else "INCONCLUSIVE"
    needed = None
    if verdict == "INCONCLUSIVE" and increase != budget:  # the bounds close in as 1 / √n
        width = upper - increase if increase < budget else increase - lower
        needed = max(FEWEST_RESAMPLED, ceil(len(truth) * (width / (budget - increase)) ** 2))
    return GateRecord(
        verdict=verdict,
        task=task,
        metric="rmse",
        examples=len(truth),
        reference=sqrt(before.mean()),
        served=sqrt(after.mean()),
        drop=increase,
        drop_upper=upper,
        budget=budget,
        confidence=confidence,
        disagreement=float(np.mean(reference != candidate)),
        examples_needed=needed,
    )


def _verdict(lower: float, upper: float, budget: float) -> Verdict:
    return "PASS" if upper <= budget else "FAIL" if lower > budget else "INCONCLUSIVE"


def _same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which rows are equal: bool (N,)."""
    equal: np.ndarray = (one == other).reshape(len(one), -1).all(axis=1)
    return equal


def increase_bounds(before: np.ndarray, after: np.ndarray, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper confidence bounds of the relative increase of an RMSE, by the paired bootstrap.

    Examples are drawn with replacement, each with both of its errors, and the bounds are percentiles of what the
    resamples give (B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Simulated, a
    model at the budget passes in 4 to 6.5% of the cases with 100 examples and more, and in up to 7.5% with 50; BCa
    bounds did no better. Damage that no example shows, no bound can know of.

    Args:
        before: squared errors float64 (N,) of the reference.
        after: squared errors of the candidate on the same examples.
        confidence: of each bound by itself.
    """
    random, n = np.random.default_rng(0), len(before)
    increases = []
    for start in range(0, RESAMPLES, size := max(1, RESAMPLED_NUMBERS // n)):
        drawn = random.integers(0, n, (min(size, RESAMPLES - start), n), dtype=np.int32)
        increases.append(_increase(before[drawn].mean(axis=1), after[drawn].mean(axis=1)))
    lower, upper = np.quantile(np.concatenate(increases), [1 - confidence, confidence])
    return float(lower), float(upper)


def _increase(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Relative increase of an RMSE from mean squared errors; none when both are nothing."""
    least = np.finfo(np.float64).tiny
    increase: np.ndarray = np.sqrt(np.maximum(after, least) / np.maximum(before, least)) - 1
    return increase


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
