"""What differs between two models' answers is measured, and the label that suffers most is named."""

from math import inf

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import binomtest, entropy, pearsonr

from bundle.manifest import Multiclass, Multilabel, Regression
from export import fidelity
from finetune.target import Target
from tests.export_examples import TASKS


def examples(n=300, noise=0.3, seed=0):
    """Targets of the three tasks, and logits of a reference and of a candidate with some noise."""
    random = np.random.default_rng(seed)
    reference = random.normal(size=(n, 6)).astype(np.float32) * 2
    kinds = (reference[:, :3] + random.normal(size=(n, 3))).argmax(axis=1)
    tags = (reference[:, 3:5] + random.normal(size=(n, 2)) > 0).astype(np.float32)
    targets = (
        Target("kind", "multiclass", ("a", "b", "c"), kinds),
        Target("tags", "multilabel", ("x", "y"), tags),
        Target("size", "regression", (), random.normal(size=n)),
    )
    return targets, reference, (reference + noise * random.normal(size=(n, 6))).astype(np.float32)


def test_divergences_are_those_of_the_probabilities():
    """scipy's entropies of the same probabilities give the same means, and the screening is their mean."""
    targets, reference, candidate = examples()
    kind, tags, size = fidelity.compare(TASKS, targets, reference, candidate)
    before, after = (softmax(one[:, :3].astype(float), axis=1) for one in (reference, candidate))
    p, q = (expit(one[:, 3:5].astype(float)) for one in (reference, candidate))
    each = entropy(np.stack([p, 1 - p]), np.stack([q, 1 - q]))
    squares = np.mean((reference[:, 5].astype(float) - candidate[:, 5]) ** 2) / 2

    assert kind.kl == pytest.approx(entropy(before, after, axis=1).mean())
    assert tags.kl == pytest.approx(each.mean())
    assert (size.kl, size.calibration_error, size.worst_class) == (None, None, None)
    assert fidelity.screen_kl(TASKS, reference, candidate) == pytest.approx(np.mean([kind.kl, tags.kl, squares]))
    assert fidelity.screen_kl(TASKS, reference, reference) == 0


def test_sure_predictions_have_a_finite_divergence():
    """Logits far apart have probabilities that float32 calls 0, yet no division by them."""
    sure = np.array([[300.0, -300.0, 0.0]], np.float32)
    assert fidelity.screen_kl(TASKS[:1], sure, sure[:, [1, 0, 2]]) == pytest.approx(600)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_ranks_last(value):
    """Screening gives infinity, and the description counts the example and leaves it out of the means."""
    targets, reference, candidate = examples()
    expected = fidelity.compare(
        TASKS, [target.take(np.arange(1, 300)) for target in targets], reference[1:], candidate[1:]
    )
    candidate[0] = value
    found = fidelity.compare(TASKS, targets, reference, candidate)

    assert fidelity.screen_kl(TASKS, reference, candidate) == inf
    assert [one.broken for one in found] == [1, 1, 1]
    assert found[0].kl == pytest.approx(expected[0].kl)
    assert fidelity.compare(TASKS, targets, reference, np.full_like(candidate, value))[0].kl is None


def test_cosines_are_of_what_differs_between_examples():
    """A direction that all logits share counts for nothing; of one column it is Pearson's correlation."""
    targets, reference, candidate = examples()
    kind, _, size = fidelity.compare(TASKS, targets, reference + 100, candidate + 100)
    centred, moved = (one[:, :3].astype(float) - reference[:, :3].mean(axis=0) for one in (reference, candidate))
    cosines = (centred * moved).sum(axis=1) / np.linalg.norm(centred, axis=1) / np.linalg.norm(moved, axis=1)

    assert kind.cosine == pytest.approx(cosines.mean(), abs=1e-4)
    assert size.cosine == pytest.approx(pearsonr(reference[:, 5], candidate[:, 5])[0], abs=1e-5)
    assert fidelity.compare(TASKS[2:], targets[2:], np.ones((300, 1)), np.ones((300, 1)))[0].cosine == 1


def test_the_calibration_error_is_the_distance_of_confidence_and_accuracy():
    """Ten answers with 0.9 of which six are right are off by 0.3; doubled logits make the same answers too sure."""
    task = Multiclass(name="kind", labels=("a", "b"))
    logits = np.tile([np.log(9.0), 0.0], (10, 1))
    truth = np.array([0] * 6 + [1] * 4)
    assert fidelity.calibration_error(task, truth, logits) == pytest.approx(0.3)
    (found,) = fidelity.compare((task,), (Target("kind", "multiclass", ("a", "b"), truth),), logits, 2 * logits)
    assert found.calibration_error == pytest.approx((0.3, 81 / 82 - 0.6))

    sets = Multilabel(name="tags", labels=("x", "y"))
    held = np.array([[1, 0], [1, 0], [1, 0], [0, 1]])
    assert fidelity.calibration_error(sets, held, np.log([[3.0, 1 / 3]] * 4)) == pytest.approx(0)


@pytest.mark.parametrize("task", [0, 1])
def test_a_label_that_collapsed_is_found(task):
    """The label of which no answer is left is named, and that is no chance, whatever other labels gained."""
    targets, reference, candidate = examples(noise=0.05)
    candidate[:, 1 if task == 0 else 4] = -20
    worst = fidelity.compare(TASKS, targets, reference, candidate)[task].worst_class
    assert worst.label == ("b", "y")[task]
    assert worst.candidate == 0 < worst.reference
    assert worst.examples == (targets[task].values == 1).sum(axis=0).flat[-1]
    assert not worst.within_chance


def test_a_few_lost_answers_are_within_chance():
    """The p-value is the exact sign test's, times the number of labels for the most significant one."""
    task = Multiclass(name="kind", labels=("a", "b", "c"))
    truth = np.repeat([0, 1, 2], 20)
    said = truth.copy()
    said[:4] = 1
    logits, worse = (np.eye(3)[labels] for labels in (truth, said))
    (found,) = fidelity.compare((task,), (Target("kind", "multiclass", task.labels, truth),), logits, worse)
    assert (found.worst_class.label, found.worst_class.candidate) == ("a", 0.8)
    assert found.worst_class.p_value == pytest.approx(3 * binomtest(4, 4, alternative="greater").pvalue)
    assert found.worst_class.within_chance
    (same,) = fidelity.compare((task,), (Target("kind", "multiclass", task.labels, truth),), worse, logits)
    assert same.worst_class is None


def test_many_labels_find_a_false_alarm_in_one_of_twenty():
    """Where answers change by chance alone, Holm's correction keeps the worst of ten labels within chance."""
    random, alarms = np.random.default_rng(0), 0
    task = Multiclass(name="kind", labels=tuple("abcdefghij"))
    target = Target("kind", "multiclass", task.labels, np.arange(1000) % 10)
    for _ in range(100):
        logits = [np.eye(10)[np.where(random.random(1000) < 0.1, 0, target.values)] for _ in range(2)]
        worst = fidelity.compare((task,), (target,), *logits)[0].worst_class
        alarms += worst is not None and not worst.within_chance
    assert alarms <= 5 + 3 * np.sqrt(100 * 0.05 * 0.95)


def test_a_regression_stands_alone():
    """A single task has no name, and of numbers only the correlation is told."""
    task = Regression(name="size", mean=10.0, std=2.0)
    target = Target("size", "regression", (), np.array([1.0, np.nan, 3.0]))
    (found,) = fidelity.compare((task,), (target,), np.array([[1.0], [9.0], [2.0]]), np.array([[2.0], [0.0], [4.0]]))
    assert (found.task, found.broken, found.cosine) == (None, 0, pytest.approx(1))
