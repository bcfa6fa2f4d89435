"""What is measured of predictions: one definition from the training log to the gate.

Definitions are scikit-learn's, which is the oracle of the tests. Labels come as indices int (N,), or, where any number
of them may hold, as 0 and 1 of any type (N, C). What would be 0 / 0 is 0, as it is there with zero_division=0.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Average = Literal["macro", "micro"]


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 (classes, classes): row = true label, column = predicted label.

    Args:
        truth: int (N,), in [0, classes).
        predicted: int (N,), in [0, classes).
        classes: how many labels there are.
    """
    pairs = np.asarray(truth, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Fraction of the examples whose prediction is the truth; of (N, C), every label of it."""
    equal = np.asarray(truth) == np.asarray(predicted)
    return float(np.mean(equal.all(axis=1) if equal.ndim == 2 else equal))


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of the recalls of the labels that are true somewhere; int (N,) only."""
    counts = _square(truth, predicted)
    support = counts.sum(axis=1)
    return float(np.mean(np.diag(counts)[support > 0] / support[support > 0]))


def mcc(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews' correlation of truth and prediction, of any number of labels, in [-1, 1]; int (N,) only.

    0 when either is the same for all examples.
    """
    counts = _square(truth, predicted).astype(np.float64)
    true, called, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    product = (total**2 - called @ called) * (total**2 - true @ true)
    return float((np.trace(counts) * total - true @ called) / np.sqrt(product)) if product > 0 else 0.0


def _square(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return confusion(truth, predicted, int(max(np.max(truth), np.max(predicted))) + 1)


@dataclass(frozen=True)
class LabelCounts:
    """How often each label was rightly predicted, wrongly predicted, and missed: int64 (C,) each."""

    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray

    @property
    def support(self) -> np.ndarray:
        """In how many examples each label is true, int64 (C,)."""
        support: np.ndarray = self.true_positives + self.false_negatives
        return support

    @property
    def precision(self) -> np.ndarray:
        """Of each label TP / (TP + FP), float64 (C,)."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> np.ndarray:
        """Of each label TP / (TP + FN), float64 (C,)."""
        return _ratio(self.true_positives, self.support)

    @property
    def f1(self) -> np.ndarray:
        """Of each label 2·TP / (2·TP + FP + FN), float64 (C,)."""
        wrong = self.false_positives + self.false_negatives
        return _ratio(2 * self.true_positives, 2 * self.true_positives + wrong)


def label_counts(truth: np.ndarray, predicted: np.ndarray, classes: int | None = None) -> LabelCounts:
    """The counts that precision, recall and F1 are made of.

    Args:
        truth: int (N,), or 0 and 1 (N, C).
        predicted: the same.
        classes: C; of int (N,) by default one more than the highest.
    """
    if np.ndim(truth) == 2:
        holds, said = np.asarray(truth, bool), np.asarray(predicted, bool)
        return LabelCounts((holds & said).sum(axis=0), (~holds & said).sum(axis=0), (holds & ~said).sum(axis=0))
    counts = _square(truth, predicted) if classes is None else confusion(truth, predicted, classes)
    right = np.diag(counts)
    return LabelCounts(right, counts.sum(axis=0) - right, counts.sum(axis=1) - right)


def precision(truth: np.ndarray, predicted: np.ndarray, average: Average) -> float:
    """Of what was predicted, the fraction that is true: see macro_f1 for the labels, label_counts for the arguments."""
    return float(np.mean(_averaged(truth, predicted, average).precision))


def recall(truth: np.ndarray, predicted: np.ndarray, average: Average) -> float:
    """Of what is true, the fraction that was predicted: see macro_f1 for the labels, label_counts for the arguments."""
    return float(np.mean(_averaged(truth, predicted, average).recall))


def f1(truth: np.ndarray, predicted: np.ndarray, average: Average) -> float:
    """The harmonic mean of precision and recall: see macro_f1 for the labels, label_counts for the arguments."""
    return float(np.mean(_averaged(truth, predicted, average).f1))


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the labels of 2·TP / (2·TP + FP + FN), unweighted.

    Of int (N,) a label that is neither true nor predicted anywhere is left out; of (N, C) it counts as 0.
    """
    return f1(truth, predicted, "macro")


def _averaged(truth: np.ndarray, predicted: np.ndarray, average: Average) -> LabelCounts:
    """The counts whose ratios are to be averaged: of each label, or of all labels as if they were one."""
    counts = label_counts(truth, predicted)
    parts = np.stack([counts.true_positives, counts.false_positives, counts.false_negatives])
    if average == "micro":
        parts = parts.sum(axis=1, keepdims=True)
    elif np.ndim(truth) == 1:
        parts = parts[:, parts.any(axis=0)]
    return LabelCounts(*parts)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
    return ratio


def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: how often a random true example has a higher score than a random false one.

    Equal scores count half. Of several labels it is the mean over each against the rest. NaN where a label is true of
    no example or of all of them, for which there is no such pair.

    Args:
        truth: 0 and 1 (N,) or (N, C), or of scores (N, C) int (N,) in [0, C).
        scores: float (N,) or (N, C); any that rise with the belief.
    """
    truth, scores = np.asarray(truth), np.asarray(scores)
    if scores.ndim == 1:
        return _auroc(truth.astype(bool), scores)
    if truth.ndim == 1:
        truth = truth[:, None] == np.arange(scores.shape[1])
    return float(np.mean([_auroc(truth[:, c].astype(bool), scores[:, c]) for c in range(scores.shape[1])]))


def _auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if positives == 0 or negatives == 0:
        return float("nan")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # from 1; of equal scores the mean
    return float((ranks[place][truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def mae(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean absolute difference of numbers float (N,)."""
    return float(np.mean(np.abs(_errors(truth, predicted))))


def rmse(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Root of the mean squared difference of numbers float (N,)."""
    return float(np.sqrt(np.mean(np.square(_errors(truth, predicted)))))


def r2(truth: np.ndarray, predicted: np.ndarray) -> float:
    """1 - squared errors / squared deviations of the truth from its mean, of numbers float (N,).

    When the truth is constant it is 1 for predictions without an error, else 0. NaN of fewer than two numbers.
    """
    truth = np.asarray(truth, np.float64)
    if len(truth) < 2:
        return float("nan")
    errors = float(np.square(_errors(truth, predicted)).sum())
    deviations = float(np.square(truth - truth.mean()).sum())
    if errors == 0 or deviations == 0:
        return float(errors == 0)
    return 1 - errors / deviations


def _errors(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    errors: np.ndarray = np.asarray(truth, np.float64) - np.asarray(predicted, np.float64)
    return errors
