import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from bundle.metrics import accuracy, confusion, macro_f1

CORNERS = {
    "all right": ([0, 1, 2], [0, 1, 2]),
    "all wrong": ([0, 1, 2], [1, 2, 0]),
    "one class": ([0, 0, 0], [0, 0, 0]),
    "one class, not the first": ([3, 3], [3, 3]),
    "one example": ([1], [0]),
    "a class that is never predicted": ([0, 1, 2, 2], [0, 1, 1, 0]),
    "a class that is only predicted": ([0, 0, 1], [0, 2, 2]),
    "a gap in the classes": ([0, 5, 5], [0, 5, 0]),
}


def check(truth, predicted, classes):
    assert accuracy(truth, predicted) == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    assert macro_f1(truth, predicted) == pytest.approx(
        f1_score(truth, predicted, average="macro", zero_division=0.0), abs=1e-12
    )
    expected = confusion_matrix(truth, predicted, labels=range(classes))
    np.testing.assert_array_equal(confusion(truth, predicted, classes), expected)


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


def test_metrics_are_plain_numbers():
    """The result goes into JSON as it is."""
    truth = np.array([0, 1])

    assert type(accuracy(truth, truth)) is float
    assert type(macro_f1(truth, truth)) is float
