"""The paired bootstrap of metrics that are no mean over examples: bounds of what a compiled model lost.

Examples are drawn with replacement, each with the answers of both models, and bounds are percentiles of what the
resamples give (B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). A resample is a row
of weights, how often each distinct example was drawn; all metrics here are exact functions of such weights.

A bootstrap knows no damage that it has not seen: of a candidate that changed no answer it would prove a drop of zero.
So the upper bound of a classification metric is drawn from the examples and one more, that the reference got right and
the candidate lost, where that costs the metric most (see lost_examples). For a plain count of losses this is the exact
bound of Clopper and Pearson, up to the difference of binomial and Poisson: after k losses it too takes the percentile
of k + 1 (of none in n, 3 / n). A label with few examples thus cannot be certified closely, by macro averages least.
Simulated at a true drop equal to the budget, with 50 to 4,000 examples, damage in all labels or in the rarest one, at
most one of twenty models passes; by the plain percentiles it was up to two of three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

RESAMPLES = 10_000
RANKED_RESAMPLES = 2_000  # of ranks, which cost more to draw again; the level is then known to 0.5%
NUMBERS = 250_000  # at a time: what a core's cache holds

Weights = np.ndarray
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What two models answered to the same examples, as a function of how often each example counts.

    Attributes:
        counts: int64 (K,), how many examples each distinct one stands for; 0 for one that might have been lost.
        measure: from weights float64 (R, K) to the metric float64 (R,) of the reference and of the candidate.
        resamples: how many to draw.
        relative: a drop is (candidate - reference) / reference, of an error, instead of reference - candidate.
    """

    counts: np.ndarray
    measure: Callable[[Weights], Pair]
    resamples: int
    relative: bool = False

    def drops(self, weights: Weights) -> np.ndarray:
        """What the candidate lost, float64 (R,)."""
        reference, candidate = self.measure(weights)
        return _increase(reference, candidate) if self.relative else reference - candidate


@dataclass(frozen=True)
class Bounds:
    """A drop and its one-sided confidence bounds."""

    reference: float  # the metric
    served: float
    drop: float
    lower: float
    upper: float
    seen_upper: float  # without the example that might have been lost


def bounds(comparison: Comparison, confidence: float) -> Bounds:
    """One-sided lower and upper bounds of the drop, percentiles of the paired bootstrap with a fixed seed.

    Args:
        comparison: of the two models.
        confidence: of each bound by itself.
    """
    (reference,), (served,) = comparison.measure(comparison.counts[None].astype(np.float64))
    (drop,) = comparison.drops(comparison.counts[None].astype(np.float64))
    seen = _resampled(comparison, comparison.counts)
    lower, seen_upper = np.quantile(seen, [1 - confidence, confidence])
    upper = seen_upper
    lost = np.flatnonzero(comparison.counts == 0)
    if len(lost):
        more = np.repeat(comparison.counts[None], len(lost), axis=0)
        more[np.arange(len(lost)), lost] = 1
        worst = comparison.drops(more.astype(np.float64)).argmax()
        upper = max(seen_upper, np.quantile(_resampled(comparison, more[worst]), confidence))
    return Bounds(*(float(value) for value in (reference, served, drop, lower, upper, seen_upper)))


def _resampled(comparison: Comparison, counts: np.ndarray) -> np.ndarray:
    """Drops float64 (resamples,) of as many examples as there are, drawn from those that `counts` stands for."""
    random, n = np.random.default_rng(0), int(comparison.counts.sum())
    size = max(1, NUMBERS // max(n, len(counts)))
    drops = [
        comparison.drops(_weights(random, counts, n, min(size, comparison.resamples - start)).astype(np.float64))
        for start in range(0, comparison.resamples, size)
    ]
    return np.concatenate(drops)


def _weights(random: np.random.Generator, counts: np.ndarray, n: int, resamples: int) -> Weights:
    """How often each distinct example is among n drawn ones, int64 (resamples, K)."""
    if 16 * len(counts) < n:
        return random.multinomial(n, counts / counts.sum(), resamples)
    examples = np.repeat(np.arange(len(counts)), counts)
    drawn = examples[random.integers(0, len(examples), (resamples, n), dtype=np.int32)]
    drawn += len(counts) * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * len(counts)).reshape(resamples, len(counts))


def compare_labels(
    metric: str, truth: np.ndarray, reference: np.ndarray, candidate: np.ndarray, *, exclusive: bool
) -> Comparison:
    """Compare predicted labels, example by example.

    Args:
        metric: balanced_accuracy, macro_f1, micro_f1 or mcc, as bundle.metrics defines them. A label that is in no
            example of a resample is left out of that resample's mean where bundle.metrics would leave it out.
        truth: bool (N, C).
        reference: labels predicted in PyTorch, of the same shape.
        candidate: labels predicted by the compiled model.
        exclusive: just one label of each row holds.
    """
    distinct, counts = np.unique(np.concatenate([truth, reference, candidate], axis=1), axis=0, return_counts=True)
    right, wrong = lost_examples(truth, exclusive)
    rows = np.concatenate([distinct, np.concatenate([right, right, wrong], axis=1)]).astype(np.float64)
    true, before, after = np.split(rows, 3, axis=1)
    average = _AVERAGES[metric] if exclusive or metric != "macro_f1" else partial(_macro_f1, every=True)

    def measure(weights: Weights) -> Pair:
        support = weights @ true
        values = [average(weights @ (true * said), support, weights @ said) for said in (before, after)]
        return values[0], values[1]

    return Comparison(np.concatenate([counts, np.zeros(len(right), np.int64)]), measure, RESAMPLES)


def lost_examples(truth: np.ndarray, exclusive: bool) -> Pair:
    """Examples that might be lost: the true labels bool (L, C), and what a candidate would say instead.

    Of single labels one for each, taken for the rarest other one, and for the rarest, taken for each of the others. Of
    sets one for each label, of which nothing is right: the candidate says all other labels instead.
    """
    support, one = truth.sum(axis=0), np.eye(truth.shape[1], dtype=bool)
    present = np.flatnonzero(support)
    if not exclusive or truth.shape[1] == 1:
        return one[present], ~one[present]
    ordered = present[np.argsort(support[present], kind="stable")]
    others = ordered if len(ordered) > 1 else np.append(ordered, np.flatnonzero(support == 0)[:1])
    pairs = [(c, others[1] if c == others[0] else others[0]) for c in ordered] + [(others[0], d) for d in others[2:]]
    right, wrong = np.transpose(pairs)
    return one[right], one[wrong]


def _balanced_accuracy(hits: np.ndarray, support: np.ndarray, said: np.ndarray) -> np.ndarray:
    return _mean(hits, support, support > 0)


def _macro_f1(hits: np.ndarray, support: np.ndarray, said: np.ndarray, every: bool = False) -> np.ndarray:
    whole = support + said
    return _mean(2 * hits, whole, (whole > 0) | every)


def _micro_f1(hits: np.ndarray, support: np.ndarray, said: np.ndarray) -> np.ndarray:
    return _ratio(2 * hits.sum(axis=1), (support + said).sum(axis=1))


def _mcc(hits: np.ndarray, support: np.ndarray, said: np.ndarray) -> np.ndarray:
    total = support.sum(axis=1)
    covariance = hits.sum(axis=1) * total - (support * said).sum(axis=1)
    variances = (total**2 - (said**2).sum(axis=1)) * (total**2 - (support**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(np.maximum(variances, 0)))


_AVERAGES = {"balanced_accuracy": _balanced_accuracy, "macro_f1": _macro_f1, "micro_f1": _micro_f1, "mcc": _mcc}
"""From true positives, support and predictions of each label, float64 (R, C), to the metric, float64 (R,)."""


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
    return ratio


def _mean(part: np.ndarray, whole: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean of the ratios in each row that count, float64 (R,); 0 where none does."""
    return _ratio((_ratio(part, whole) * counted).sum(axis=1), counted.sum(axis=1).astype(np.float64))


def compare_scores(truth: np.ndarray, reference: np.ndarray, candidate: np.ndarray, *, exclusive: bool) -> Comparison:
    """Compare scores by the area under the ROC curve, the mean over each label against the rest.

    A label that all examples of a resample have, or none, is left out of that resample's mean.

    Args:
        truth: bool (N, C); each label holds for some of the examples, and not for all.
        reference: scores float (N, C) in PyTorch.
        candidate: scores of the compiled model.
        exclusive: just one label of each row holds.
    """
    right, wrong = lost_examples(truth, exclusive)
    true = np.concatenate([truth, right])
    before, after = (
        np.concatenate([scores, np.where(said, np.inf, -np.inf)])
        for scores, said in ((reference, right), (candidate, wrong))
    )
    ranked = [[_ranking(true[:, c], scores[:, c]) for c in range(true.shape[1])] for scores in (before, after)]

    def measure(weights: Weights) -> Pair:
        drawn = np.ascontiguousarray(weights.T)
        values = [_areas(drawn, ranking) for ranking in ranked]
        return values[0], values[1]

    counts = np.repeat([1, 0], [len(truth), len(right)])
    return Comparison(counts, measure, RANKED_RESAMPLES)


@dataclass(frozen=True, eq=False)
class _Ranking:
    """The examples with a label and those without, and how many of those each of the others outranks."""

    positives: np.ndarray  # int64 (P,), positions
    negatives: np.ndarray  # int64 (N - P,), positions by ascending score
    below: np.ndarray  # int64 (P,), how many negatives have a lower score
    level: np.ndarray  # int64 (P,), how many have a lower or the same


def _ranking(true: np.ndarray, scores: np.ndarray) -> _Ranking:
    positives, negatives = np.flatnonzero(true), np.flatnonzero(~true)
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    low, high = (np.searchsorted(scores[negatives], scores[positives], side) for side in ("left", "right"))
    return _Ranking(positives, negatives, low, high)


def _areas(weights: np.ndarray, rankings: list[_Ranking]) -> np.ndarray:
    """Mean areas under the ROC curve float64 (R,), the examples weighted by float64 (N, R)."""
    total, counted = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for ranking in rankings:
        passed = np.zeros((len(ranking.negatives) + 1, weights.shape[1]))
        np.cumsum(weights[ranking.negatives], axis=0, out=passed[1:])
        drawn = weights[ranking.positives]
        won = np.einsum("pr,pr->r", drawn, passed[ranking.below] + passed[ranking.level]) / 2
        pairs = drawn.sum(axis=0) * passed[-1]
        total += _ratio(won, pairs)
        counted += pairs > 0
    return _ratio(total, counted)


def compare_values(metric: str, truth: np.ndarray, reference: np.ndarray, candidate: np.ndarray) -> Comparison:
    """Compare predicted values by the relative increase of an error: rmse or mae.

    Simulated, a model whose RMSE is at the budget passes in 4 to 6.5% of the cases with 100 examples and more, and in
    up to 7.5% with 50; BCa bounds did no better. Damage that no example shows, no bound of an error can know of.

    Args:
        metric: rmse or mae.
        truth: float (N,).
        reference: values predicted in PyTorch, float (N,).
        candidate: values predicted by the compiled model.
    """
    errors = [np.abs(values.astype(np.float64) - truth) for values in (reference, candidate)]
    before, after = (np.square(error) if metric == "rmse" else error for error in errors)

    def measure(weights: Weights) -> Pair:
        means = [weights @ error / weights.sum(axis=1) for error in (before, after)]
        return (np.sqrt(means[0]), np.sqrt(means[1])) if metric == "rmse" else (means[0], means[1])

    return Comparison(np.ones(len(truth), np.int64), measure, RESAMPLES, relative=True)


def _increase(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Relative increase of an error; none when both are nothing."""
    least = np.sqrt(np.finfo(np.float64).tiny)
    increase: np.ndarray = np.maximum(after, least) / np.maximum(before, least) - 1
    return increase
