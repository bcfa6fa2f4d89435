"""Accuracy and F1 from label indices: one definition from the training log to the gate.

Definitions are scikit-learn's, which is the oracle of the tests.
"""

import numpy as np


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
    """Fraction of the examples whose predicted label is the true one."""
    return float(np.mean(np.asarray(truth) == np.asarray(predicted)))


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the labels of 2·TP / (2·TP + FP + FN), unweighted.

    A label that is neither true nor predicted anywhere is left out.
    """
    classes = int(max(np.max(truth), np.max(predicted))) + 1
    counts = confusion(truth, predicted, classes)
    denominator = counts.sum(axis=0) + counts.sum(axis=1)
    seen = denominator > 0
    return float(np.mean(2 * np.diag(counts)[seen] / denominator[seen]))
