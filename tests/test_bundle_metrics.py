"""Every metric against scikit-learn's, its corner cases included."""

import warnings

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    precision_recall_fscore_support,
    precision_score,
    r2_score,
    recall_score,
    roc_auc_score,
    root_mean_squared_error,
)

from bundle import metrics

CORNERS = {
    "all right": ([0, 1, 2], [0, 1, 2]),
    "all wrong": ([0, 1, 2], [1, 2, 0]),
    "one class": ([0, 0, 0], [0, 0, 0]),
    "one class, not the first": ([3, 3], [3, 3]),
    "one example": ([1], [0]),
    "a constant prediction": ([0, 1, 2, 1], [1, 1, 1, 1]),
    "a constant truth": ([1, 1, 1, 1], [0, 1, 2, 1]),
    "a class that is never predicted": ([0, 1, 2, 2], [0, 1, 1, 0]),
    "a class that is only predicted": ([0, 0, 1], [0, 2, 2]),
    "a gap in the classes": ([0, 5, 5], [0, 5, 0]),
}

SHARES = {
    "precision": (metrics.precision, precision_score),
    "recall": (metrics.recall, recall_score),
    "f1": (metrics.f1, f1_score),
}


@pytest.fixture(autouse=True)
def quiet_oracle():
    """scikit-learn warns of a label that is absent, and of one label alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")
        yield


def check_shares(truth, predicted):
    for ours, theirs in SHARES.values():
        for average in ("macro", "micro"):
            expected = theirs(truth, predicted, average=average, zero_division=0.0)
            assert ours(truth, predicted, average) == pytest.approx(expected, abs=1e-12)


def check(truth, predicted, classes):
    assert metrics.accuracy(truth, predicted) == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    expected = balanced_accuracy_score(truth, predicted)
    assert metrics.balanced_accuracy(truth, predicted) == pytest.approx(expected, abs=1e-12)
    assert metrics.mcc(truth, predicted) == pytest.approx(matthews_corrcoef(truth, predicted), abs=1e-12)
    check_shares(truth, predicted)
    expected = f1_score(truth, predicted, average="macro", zero_division=0.0)
    assert metrics.macro_f1(truth, predicted) == pytest.approx(expected, abs=1e-12)
    expected = confusion_matrix(truth, predicted, labels=range(classes))
    np.testing.assert_array_equal(metrics.confusion(truth, predicted, classes), expected)
    check_each(truth, predicted, classes)


def check_each(truth, predicted, classes):
    ours = metrics.label_counts(truth, predicted, classes)
    theirs = precision_recall_fscore_support(truth, predicted, labels=range(classes), zero_division=0.0)
    for mine, expected in zip((ours.precision, ours.recall, ours.f1, ours.support), theirs, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-12)


@pytest.mark.parametrize("corner", CORNERS)
def test_metrics_agree_with_scikit_learn_on_corner_cases(corner):
    """A label that is absent, lonely or alone counts as scikit-learn counts it."""
    truth, predicted = (np.array(labels) for labels in CORNERS[corner])

    check(truth, predicted, classes=7)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("seed", range(20))
def test_metrics_agree_with_scikit_learn_on_random_labels(seed, dtype):
    """Any number of classes and examples, in any integer type, gives scikit-learn's numbers."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 200))
    truth, predicted = rng.integers(0, classes, (2, int(rng.integers(1, 500)))).astype(dtype)

    check(truth, predicted, classes)


@pytest.mark.parametrize("dtype", [bool, np.float32, np.int64])
@pytest.mark.parametrize("seed", range(20))
def test_metrics_agree_with_scikit_learn_on_sets_of_labels(seed, dtype):
    """Sets of labels, empty ones, labels that are never true and never predicted included."""
    rng = np.random.default_rng(seed)
    shape = int(rng.integers(1, 50)), int(rng.integers(2, 9))
    truth = rng.random(shape) < rng.choice([0, 0.2, 0.7, 1], shape[1])
    predicted = np.where(rng.random(shape) < 0.7, truth, rng.random(shape) < 0.3)
    ours = truth.astype(dtype), predicted.astype(dtype)

    assert metrics.accuracy(*ours) == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    check_shares(truth, predicted)
    for mine, (_, theirs) in zip(("precision", "recall", "f1"), SHARES.values(), strict=True):
        expected = theirs(truth, predicted, average=None, zero_division=0.0)
        np.testing.assert_allclose(getattr(metrics.label_counts(*ours), mine), expected, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 5, 10_000])
@pytest.mark.parametrize("seed", range(10))
def test_auroc_is_scikit_learns(seed, levels):
    """Of one label and of several, with many ties, few, or nothing but one."""
    rng = np.random.default_rng(seed)
    count, classes = int(rng.integers(3, 200)), int(rng.integers(3, 9))
    truth = rng.permutation(np.arange(count) % classes)  # each is there: scikit-learn refuses the rest
    scores = rng.integers(1, levels + 1, (count, classes)).astype(np.float64)
    scores /= scores.sum(axis=1, keepdims=True)
    sets = truth[:, None] == np.arange(classes)

    if count >= classes:
        assert metrics.auroc(truth, scores) == pytest.approx(roc_auc_score(truth, scores, multi_class="ovr"), abs=1e-12)
    assert metrics.auroc(truth > 0, scores[:, 1]) == pytest.approx(roc_auc_score(truth > 0, scores[:, 1]), abs=1e-12)
    expected = roc_auc_score(sets, scores)
    assert metrics.auroc(sets, scores) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_auroc_of_two_classes_is_that_of_either():
    """Two columns of scores that sum to one are one binary problem."""
    rng = np.random.default_rng(0)
    truth, score = rng.integers(0, 2, 50), rng.random(50)

    assert metrics.auroc(truth, np.stack([1 - score, score], axis=1)) == pytest.approx(roc_auc_score(truth, score))


def test_auroc_without_a_pair_is_not_a_number():
    """A label that all or no examples have cannot be told from the rest, and says so as scikit-learn does."""
    scores = np.array([[0.2, 0.8], [0.6, 0.4]])

    assert np.isnan(metrics.auroc(np.array([1, 1]), scores))
    assert np.isnan(metrics.auroc(np.array([1, 1]), scores[:, 0]))
    assert np.isnan(roc_auc_score([1, 1], scores[:, 0]))
    assert np.isnan(metrics.auroc(np.array([[1, 0], [1, 1]]), scores))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("seed", range(20))
def test_errors_of_numbers_are_scikit_learns(seed, dtype):
    """MAE, RMSE and R² at any scale and offset."""
    rng = np.random.default_rng(seed)
    scale, offset = 10.0 ** rng.integers(-5, 6), 10.0 ** rng.integers(-3, 4)
    truth = (rng.normal(size=int(rng.integers(2, 300))) * scale + offset).astype(dtype).astype(np.float64)
    predicted = (truth + rng.normal(size=len(truth)) * scale * rng.choice([0, 0.1, 10])).astype(dtype)

    assert metrics.mae(truth, predicted) == pytest.approx(mean_absolute_error(truth, predicted), rel=1e-9)
    assert metrics.rmse(truth, predicted) == pytest.approx(root_mean_squared_error(truth, predicted), rel=1e-9)
    assert metrics.r2(truth, predicted) == pytest.approx(r2_score(truth, predicted), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("truth", "predicted"),
    [([2, 2, 2], [2, 2, 2]), ([2, 2, 2], [2, 2, 3]), ([1, 2, 3], [2, 2, 2]), ([1, 2], [1, 2]), ([1], [1]), ([1], [2])],
)
def test_r2_of_constants_is_scikit_learns(truth, predicted):
    """A constant truth, a constant prediction and a lonely number."""
    expected = r2_score(truth, predicted)
    assert metrics.r2(np.array(truth), np.array(predicted)) == pytest.approx(expected, nan_ok=True)


def test_metrics_are_plain_numbers():
    """The result goes into JSON as it is."""
    truth = np.array([0, 1])
    for metric in (metrics.accuracy, metrics.balanced_accuracy, metrics.macro_f1, metrics.mcc, metrics.auroc):
        assert type(metric(truth, truth)) is float
    for metric in (metrics.mae, metrics.rmse, metrics.r2):
        assert type(metric(truth, truth)) is float
