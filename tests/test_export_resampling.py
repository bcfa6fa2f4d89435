"""Metrics that are no mean over examples pass the gate when the paired bootstrap proves it, and seldom by chance."""

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn import metrics as oracle

from bundle import metrics, outputs
from bundle.errors import DataError
from bundle.manifest import Multiclass, Multilabel, Regression
from export import gate, resampling
from export.proportions import best_certifiable
from finetune.target import Target

NUMBER = Regression(name="size", mean=0.0, std=1.0)


def judge(task, truth, reference, candidate, metric, **terms):
    """The one record of a task's logits."""
    kind = type(task).__name__.lower()
    target = Target(task.name, kind, getattr(task, "labels", ()), truth)
    (record,) = gate.judge_tasks((task,), (target,), reference, candidate, metric=metric, **{"budget": 0.01, **terms})
    return record


def regress(truth, reference, candidate, metric="rmse", budget=0.01):
    return judge(NUMBER, truth, reference[:, None], candidate[:, None], metric, budget=budget)


def classes(count):
    return Multiclass(name="kind", labels=tuple("abcdefgh"[:count]))


def logits_of(labels, count):
    return np.eye(count, dtype=np.float32)[labels] * 4


def changed(random, labels, rate, count):
    """The labels, a share of them drawn again."""
    return np.where(random.random(len(labels)) < rate, random.integers(0, count, len(labels)), labels)


def values(n, noise, seed=0):
    """True values, those of a reference with errors of 1, and those of a candidate with some noise more."""
    random = np.random.default_rng(seed)
    truth = random.normal(10, 5, n)
    reference = truth + random.normal(size=n)
    return truth, reference, reference + noise * random.normal(size=n)


@pytest.mark.parametrize("metric", ["rmse", "mae"])
def test_bounds_of_an_error_are_the_percentiles_of_a_paired_bootstrap(metric):
    """scipy's bootstrap of the same statistic gives the same bounds, up to the chance of resampling."""
    truth, reference, candidate = values(300, 0.3)
    power = 2 if metric == "rmse" else 1
    before, after = np.abs(reference - truth) ** power, np.abs(candidate - truth) ** power

    def increase(before, after, axis):
        return (after.mean(axis=axis) / before.mean(axis=axis)) ** (1 / power) - 1

    expected = bootstrap((before, after), increase, paired=True, method="percentile", confidence_level=0.9, rng=1)
    found = resampling.bounds(resampling.compare_values(metric, truth, reference, candidate), 0.95)
    assert (found.lower, found.upper) == pytest.approx(tuple(expected.confidence_interval), abs=7e-4)
    assert found.drop == pytest.approx(increase(before, after, 0))


@pytest.mark.parametrize(
    ("noise", "budget", "verdict"), [(0, 0.01, "PASS"), (0.05, 0.01, "PASS"), (1, 0.01, "FAIL"), (0.15, 0.011, None)]
)
def test_regression_verdict_follows_the_relative_rmse(noise, budget, verdict):
    """RMSEs are in the units of the target, the drop and its bound are relative to PyTorch's."""
    truth, reference, candidate = values(500, noise)
    record = regress(truth, reference, candidate, budget=budget)

    assert record.metric == "rmse"
    assert record.verdict == (verdict or "INCONCLUSIVE")
    assert record.reference == pytest.approx(np.sqrt(np.mean((reference - truth) ** 2)))
    assert record.served / record.reference == pytest.approx(1 + record.drop)
    assert record.drop <= record.drop_upper
    assert (record.examples_needed is None) == (verdict is not None)


@pytest.mark.parametrize("n", [100, 400])
def test_a_regression_at_the_budget_passes_in_about_one_of_twenty(n, monkeypatch):
    """Simulated at a true increase equal to the budget, false passes are at most 6.5%, up to the simulation's error."""
    monkeypatch.setattr(resampling, "RESAMPLES", 1000)
    budget = 0.01
    noise = np.sqrt((1 + budget) ** 2 - 1)
    passes = [regress(*values(n, noise, seed)).verdict == "PASS" for seed in range(200)]
    assert np.mean(passes) <= 0.065 + 3 * np.sqrt(0.065 * 0.935 / 200)


def test_too_few_numbers_prove_nothing():
    """The bootstrap knows no variation that it has not seen: below 50 examples even equal answers do not pass."""
    truth, reference, _ = values(49, 0)
    record = regress(truth, reference, reference)
    assert (record.verdict, record.drop, record.examples_needed) == ("INCONCLUSIVE", 0, 50)


def test_a_perfect_reference_is_no_division_by_zero():
    """Equal to the truth in both is no increase; any error beside no error is a failure."""
    truth = np.arange(60.0)
    assert regress(truth, truth, truth).verdict == "PASS"
    record = regress(truth, truth, truth + 1)
    assert record.verdict == "FAIL"
    assert np.isfinite([record.drop, record.drop_upper]).all()


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1", "mcc"])
def test_resampled_labels_are_measured_as_everywhere(metric):
    """Of any drawn examples, even without some label, the metric is that of bundle.metrics."""
    random = np.random.default_rng(0)
    truth = random.choice(5, 60, p=[0.6, 0.3, 0.05, 0.05, 0])
    said = changed(random, truth, 0.4, 5)
    rows = [np.eye(5, dtype=bool)[labels] for labels in (truth, said, said)]
    comparison = resampling.compare_labels(metric, *rows, exclusive=True)
    distinct = np.unique(np.concatenate(rows, axis=1), axis=0)
    for _ in range(20):
        drawn = random.integers(0, 60, 25)
        places = [np.flatnonzero((distinct == row).all(axis=1))[0] for row in np.concatenate(rows, axis=1)[drawn]]
        weights = np.bincount(places, minlength=len(comparison.counts)).astype(float)
        (found,), _ = comparison.measure(weights[None])
        assert found == pytest.approx(getattr(metrics, metric)(truth[drawn], said[drawn]))


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_sets_of_labels_are_measured_as_everywhere(average):
    """F1 of a multilabel task is scikit-learn's, of a label that nothing has as well."""
    random = np.random.default_rng(1)
    task = Multilabel(name="tags", labels=("x", "y", "z"))
    truth = (random.random((200, 3)) < [0.5, 0.1, 0]).astype(np.float32)
    logits = [np.where(random.random(truth.shape) < rate, 1 - truth, truth) - 0.5 for rate in (0, 0.1)]
    record = judge(task, truth, *logits, f"{average}_f1")
    expected = [oracle.f1_score(truth, one > 0, average=average, zero_division=0) for one in logits]
    assert [record.reference, record.served] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_areas_are_of_the_scores_that_are_served(kind):
    """Each label against the rest, equal scores counting half, of whatever examples are drawn."""
    random = np.random.default_rng(2)
    truth = random.integers(0, 3, 90)
    task, values, score = classes(3), truth, outputs.softmax
    logits = (random.normal(size=(90, 3)) + 2 * np.eye(3)[truth]).round(1).astype(np.float32)
    if kind == "multilabel":
        task, values, score = Multilabel(name="tags", labels=("x", "y", "z")), np.eye(3)[truth], outputs.sigmoid
    worse = (logits + random.normal(size=logits.shape)).round(1).astype(np.float32)
    record = judge(task, values, logits, worse, "auroc")
    assert record.reference == pytest.approx(metrics.auroc(truth, score(logits)))
    assert record.served == pytest.approx(metrics.auroc(truth, score(worse)))

    comparison = resampling.compare_scores(np.eye(3, dtype=bool)[truth], score(logits), score(worse), exclusive=True)
    drawn = random.integers(0, 90, 90)
    (before,), (after,) = comparison.measure(np.bincount(drawn, minlength=len(comparison.counts))[None].astype(float))
    assert before == pytest.approx(metrics.auroc(truth[drawn], score(logits)[drawn]))
    assert after == pytest.approx(metrics.auroc(truth[drawn], score(worse)[drawn]))


def test_an_area_without_examples_of_a_label_is_refused():
    """There is nothing to rank, and the message names the label."""
    truth = np.array([0, 1] * 30)
    with pytest.raises(DataError, match="0 of these 60 held-out examples of 'kind' have 'c'"):
        judge(classes(3), truth, logits_of(truth, 3), logits_of(truth, 3), "auroc")


@pytest.mark.parametrize(("n", "rare"), [(300, 60), (2000, 200)])
def test_what_no_example_shows_is_not_ruled_out(n, rare):
    """With no answer changed the bound is that of three examples lost in the rarest label, known beforehand."""
    truth = (np.arange(n) < rare).astype(np.int64)
    logits = logits_of(truth, 2)
    record = judge(classes(2), truth, logits, logits, "balanced_accuracy")
    (best,) = gate.certifiable(
        (classes(2),), (Target("kind", "multiclass", ("a", "b"), truth),), logits, metric="balanced_accuracy"
    )

    assert record.drop == 0
    assert record.drop_upper == best == pytest.approx(3 / rare / 2, rel=0.15)


def test_certifiable_of_other_metrics():
    """Accuracy has its closed form; an error has no limit that a number of examples could rule out."""
    n = 400
    truth = np.arange(n) % 2
    tasks = (classes(2), NUMBER)
    targets = (Target("kind", "multiclass", ("a", "b"), truth), Target("size", "regression", (), np.ones(n)))
    logits = np.concatenate([logits_of(truth, 2), np.zeros((n, 1), np.float32)], axis=1)
    assert gate.certifiable(tasks, targets, logits) == (pytest.approx(best_certifiable(n)), None)
    assert gate.certifiable(tasks, targets, logits, metric="mae", confidence=0.99) == (
        pytest.approx(best_certifiable(n, 0.99)),
        None,
    )


def test_examples_needed_decide_where_nothing_changed():
    """With that many examples the bound of unchanged answers reaches the budget, within the steps of a count."""
    truth = np.arange(120) % 2
    needed = judge(classes(2), truth, logits_of(truth, 2), logits_of(truth, 2), "macro_f1").examples_needed
    more = np.arange(needed) % 2
    assert needed > 120
    assert judge(classes(2), more, logits_of(more, 2), logits_of(more, 2), "macro_f1").drop_upper == pytest.approx(
        0.01, rel=0.1
    )


@pytest.mark.parametrize("metric", [None, "macro_f1", "mcc", "auroc"])
def test_an_answer_that_is_no_number_is_wrong(metric):
    """Logits that are not finite cost what wrong answers cost, and every field of the record is a number."""
    truth = np.arange(400) % 2
    broken = logits_of(truth, 2)
    broken[:40:2, 0] = np.nan
    broken[1:40:2, 1] = np.inf
    record = judge(classes(2), truth, logits_of(truth, 2), broken, metric)
    assert record.verdict == "FAIL"
    assert record.drop >= 0.099

    sizes = np.arange(400.0)
    record = regress(sizes, sizes + 1, np.where(truth == 0, np.nan, sizes))
    assert record.verdict == "FAIL"
    assert np.isfinite([record.served, record.drop, record.drop_upper]).all()


def f1_of(confusion):
    return np.mean(2 * np.diag(confusion) / (confusion.sum(axis=0) + confusion.sum(axis=1)))


@pytest.mark.parametrize(
    ("n", "shares", "hit"),
    [(300, (0.5, 0.5), (1, 1)), (1000, (0.5, 0.5), (0, 1)), (1000, (0.6, 0.2, 0.2), (0, 0, 1))],
)
def test_a_macro_f1_at_the_budget_passes_in_one_of_twenty(n, shares, hit, monkeypatch):
    """Simulated at a true drop equal to the budget, damage in all labels or in one, false passes are at most 5%."""
    monkeypatch.setattr(resampling, "RESAMPLES", 400)
    random, count, rate = np.random.default_rng(0), len(shares), 0.08
    errs = 0.9 * np.eye(count) + 0.1 / count  # of the reference: from truth to answer
    lost = rate * np.diag(hit)
    damage = np.eye(count) - lost + lost @ (1 - np.eye(count)) / (count - 1)
    joint = np.diag(shares) @ errs
    budget = f1_of(joint) - f1_of(joint @ damage)

    passes = []
    for _ in range(200):
        drawn = random.choice(count**3, n, p=(joint[:, :, None] * damage).ravel())
        rows = [np.eye(count, dtype=bool)[labels] for labels in np.unravel_index(drawn, (count,) * 3)]
        comparison = resampling.compare_labels("macro_f1", *rows, exclusive=True)
        passes.append(resampling.bounds(comparison, 0.95).upper <= budget)
    assert 0 < np.mean(passes) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_a_harmless_candidate_passes_in_most_cases(monkeypatch):
    """With 1,000 examples and 4 changed answers, lost and won alike, a point of macro F1 can be proved."""
    monkeypatch.setattr(resampling, "RESAMPLES", 400)
    random, passes = np.random.default_rng(1), []
    for _ in range(60):
        truth = random.integers(0, 3, 1000)
        reference = changed(random, truth, 0.1, 3)
        candidate, hit = reference.copy(), random.permutation(1000)
        lost, won = (hit[(reference == truth)[hit] == right][: random.poisson(2)] for right in (True, False))
        candidate[lost], candidate[won] = (truth[lost] + 1) % 3, truth[won]
        rows = [np.eye(3, dtype=bool)[labels] for labels in (truth, reference, candidate)]
        comparison = resampling.compare_labels("macro_f1", *rows, exclusive=True)
        passes.append(resampling.bounds(comparison, 0.95).upper <= 0.01)
    assert np.mean(passes) >= 0.75


@pytest.mark.parametrize("rare_damage", [False, True])
def test_an_area_at_the_budget_passes_in_one_of_twenty(rare_damage, monkeypatch):
    """Simulated at a true drop equal to the budget, by noise in all scores or by few ruined ones."""
    monkeypatch.setattr(resampling, "RANKED_RESAMPLES", 400)
    random = np.random.default_rng(0)

    def scores(n):
        truth = np.arange(n) % 2
        before = random.normal(size=n) + 2 * truth
        if rare_damage:  # a positive example in 40 falls below all
            after = np.where((random.random(n) < 0.025) & (truth == 1), -10, before)
        else:
            after = before + 0.6 * random.normal(size=n)
        return truth[:, None].astype(bool), before[:, None], after[:, None]

    truth, *models = scores(300_000)
    before, after = (metrics.auroc(truth[:, 0], scores[:, 0]) for scores in models)
    passes = [
        resampling.bounds(resampling.compare_scores(*scores(400), exclusive=False), 0.95).upper <= before - after
        for _ in range(100)
    ]
    assert np.mean(passes) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)
