"""The gate passes what is proved, fails what is refuted, and says how much is missing otherwise."""

import msgspec
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from bundle.errors import DataError, GateFailed
from export import gate, proportions
from finetune.target import Target
from tests.export_examples import TASKS


def labels(lost, won, both=0, n=1000):
    """True, reference and candidate labels with the given numbers of changes; `both` disagree and are both wrong."""
    truth = np.zeros(n, np.int64)
    reference, candidate = truth.copy(), truth.copy()
    candidate[:lost] = 1
    reference[lost : lost + won] = 1
    reference[lost + won : lost + won + both] = 1
    candidate[lost + won : lost + won + both] = 2
    return truth, reference, candidate


def score_by_likelihood(lost, won, n, drop):
    """Tango's score, its nuisance rate found by maximising the trinomial likelihood instead of in closed form."""

    def loss(won_rate):
        rates = (won_rate + drop, won_rate, 1 - 2 * won_rate - drop)
        counts = (lost, won, n - lost - won)
        return -sum(k * np.log(r) for k, r in zip(counts, rates, strict=True) if k)

    low = max(0.0, -drop) + 1e-12
    rate = minimize_scalar(loss, bounds=(low, (1 - drop) / 2 - 1e-12), method="bounded", options={"xatol": 1e-13}).x
    return (lost - won - n * drop) / np.sqrt(n * (2 * rate + drop * (1 - drop)))


@pytest.mark.parametrize(("lost", "won", "n"), [(20, 10, 1000), (3, 0, 400), (0, 4, 300), (50, 60, 2000), (7, 7, 100)])
def test_bounds_are_where_the_score_reaches_the_quantile(lost, won, n):
    """At both bounds the score statistic of an independently fitted null is ±1.645."""
    lower, upper = proportions.drop_bounds(lost, won, n, 0.95)

    assert score_by_likelihood(lost, won, n, upper) == pytest.approx(-1.6449, abs=2e-3)
    assert score_by_likelihood(lost, won, n, lower) == pytest.approx(1.6449, abs=2e-3)


@pytest.mark.parametrize("n", [50, 268, 10_000])
def test_bound_without_any_change_has_its_closed_form(n):
    """With no answer changed the upper bound is z² / (n + z²)."""
    z2 = 1.6448536**2
    assert proportions.best_certifiable(n) == pytest.approx(z2 / (n + z2), rel=1e-5)


def test_bounds_mirror_when_the_models_change_places():
    """The drop of A against B is the gain of B against A."""
    lower, upper = proportions.drop_bounds(12, 5, 500, 0.95)
    assert proportions.drop_bounds(5, 12, 500, 0.95) == pytest.approx((-upper, -lower), abs=1e-9)


@pytest.mark.parametrize(
    ("lost", "won", "n", "verdict"),
    [(0, 0, 1000, "PASS"), (10, 9, 4000, "PASS"), (60, 10, 1000, "FAIL"), (12, 8, 500, "INCONCLUSIVE")],
)
def test_verdict_follows_the_bounds(lost, won, n, verdict):
    """Within the budget by its upper bound, beyond it by its lower bound, or undecided."""
    record = gate.judge(*labels(lost, won, n=n), budget=0.01)

    assert record.verdict == verdict
    assert record.drop == pytest.approx((lost - won) / n)
    assert record.reference - record.served == pytest.approx(record.drop)


def test_disagreement_counts_changes_that_stay_wrong():
    """Two different wrong answers are no drop, but a disagreement."""
    record = gate.judge(*labels(1, 1, both=3, n=100), budget=0.01)
    assert (record.drop, record.disagreement) == (0, 0.05)


def test_examples_needed_would_decide():
    """With that many examples at the same rates the verdict is reached, and with a tenth fewer it is not."""
    record = gate.judge(*labels(4, 2, n=500), budget=0.01)
    assert record.verdict == "INCONCLUSIVE"
    needed = record.examples_needed

    assert needed is not None
    assert proportions.drop_bounds(4 * needed / 500, 2 * needed / 500, needed, 0.95)[1] <= 0.01
    assert proportions.drop_bounds(3.6 * needed / 500, 1.8 * needed / 500, 0.9 * needed, 0.95)[1] > 0.01


def test_no_number_of_examples_decides_at_the_budget():
    """A drop that equals the budget can neither be ruled out nor shown."""
    record = gate.judge(*labels(10, 5, n=500), budget=0.01)
    assert (record.verdict, record.examples_needed) == ("INCONCLUSIVE", None)


def test_fewest_examples_can_just_pass():
    """One example fewer could not pass even without a change."""
    n = proportions.fewest_examples(0.01)
    assert proportions.best_certifiable(n) <= 0.01 < proportions.best_certifiable(n - 1)


@pytest.mark.parametrize(("n", "discordant"), [(300, 0.02), (1000, 0.02), (1000, 0.05), (4000, 0.02)])
def test_a_model_at_the_budget_passes_in_one_of_twenty(n, discordant):
    """Simulated at a true drop equal to the budget, false passes are at most 5%, up to the error of the simulation."""
    budget = 0.01
    rates = ((discordant + budget) / 2, (discordant - budget) / 2, 1 - discordant)
    drawn = np.random.default_rng(1).multinomial(n, rates, 4000)
    pairs, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    passes = [proportions.drop_bounds(lost, won, n, 0.95)[1] <= budget for lost, won in pairs]

    assert np.sum(counts * passes) / 4000 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)


def test_a_set_of_labels_is_right_as_a_whole():
    """One wrong label makes the answer wrong, and a second one no wronger."""
    truth = np.array([[0, 1], [1, 1], [0, 0], [1, 0]])
    candidate = np.array([[0, 1], [1, 0], [1, 1], [1, 0]])
    record = gate.judge(truth, truth, candidate, budget=0.01)
    assert (record.metric, record.reference, record.served, record.disagreement) == ("exact_match", 1, 0.5, 0.5)


def test_tasks_are_judged_each_on_what_is_known_of_it():
    """What is not known of a task does not count for it, and the worst task speaks for the model."""
    n = 400
    random = np.random.default_rng(0)
    logits = random.normal(size=(n, 6)).astype(np.float32)
    kinds = logits[:, :3].argmax(axis=1)
    kinds[::4] = -1
    tags = (logits[:, 3:5] >= 0).astype(np.float32)
    tags[:100] = np.nan
    sizes = logits[:, 5] * 2.0 + 3 + random.normal(size=n)
    sizes[:340] = np.nan
    targets = [
        Target("kind", "multiclass", ("a", "b", "c"), kinds),
        Target("tags", "multilabel", ("x", "y"), tags),
        Target("size", "regression", (), sizes),
    ]
    worse = logits.copy()
    worse[100:130, 3] *= -1
    records = gate.judge_tasks(TASKS, targets, logits, worse, budget=0.05)

    assert [record.examples for record in records] == [300, 300, 60]
    assert [record.metric for record in records] == ["accuracy", "exact_match", "rmse"]
    assert [record.task for record in records] == ["kind", "tags", "size"]
    assert [record.verdict for record in records] == ["PASS", "FAIL", "PASS"]
    assert records[1].drop == pytest.approx(0.1)
    assert gate.closest(records) is records[1]
    assert gate.judge_tasks(TASKS[:1], targets[:1], logits, worse, budget=0.05)[0].task is None


@pytest.mark.parametrize(("found", "n"), [(0, 300), (3, 300), (40, 50), (50, 50), (2500, 10_000)])
def test_the_disagreement_has_its_exact_bound(found, n):
    """scipy's Clopper-Pearson interval has the same upper end, whose two sides take 5% each."""
    expected = binomtest(found, n).proportion_ci(0.9, method="exact").high
    assert proportions.fraction_upper(found, n, 0.95) == pytest.approx(expected, abs=1e-9)

    record = gate.judge(*labels(1, 1, both=3, n=100), budget=0.01)
    assert record.disagreement_upper == proportions.fraction_upper(5, 100, 0.95)


def test_a_stricter_confidence_needs_more_examples():
    """The bound moves away from the drop, and what passed at 95% no longer does at 99%."""
    passed, missed = (gate.judge(*labels(0, 0, n=300), budget=0.01, confidence=c) for c in (0.95, 0.99))
    assert (passed.verdict, missed.verdict) == ("PASS", "INCONCLUSIVE")
    assert passed.drop_upper < missed.drop_upper


def test_a_metric_applies_to_the_tasks_that_it_fits():
    """Others keep their own; one that fits none is refused with those that would do."""
    assert gate.gated_metrics(TASKS) == ("accuracy", "exact_match", "rmse")
    assert gate.gated_metrics(TASKS, "macro_f1") == ("macro_f1", "macro_f1", "rmse")
    assert gate.gated_metrics(TASKS, "mae") == ("accuracy", "exact_match", "mae")
    assert gate.gated_metrics(TASKS[:1], "auroc") == ("auroc",)
    with pytest.raises(DataError, match=r"'micro_f1' .* there are accuracy, balanced_accuracy, macro_f1, mcc, auroc\."):
        gate.gated_metrics(TASKS[:1], "micro_f1")


def test_gate_failure_has_its_own_exit_code():
    """The command exits with 3 when the gate fails."""
    assert GateFailed.exit_code == 3


def test_chance_is_of_the_gate_to_come():
    """The same rates on more examples leave more room; a few answers lost say little, many say what the gate would."""
    truth = np.zeros(300, dtype=np.int64)
    record, many = (gate.judge(truth, truth, np.arange(300) < lost, budget=0.04) for lost in (6, 200))

    assert gate.chance_of_passing([record], 0.5) < gate.chance_of_passing([record], 1)
    assert gate.chance_of_passing([record], 1) < gate.chance_of_passing([record], 4) < 1
    assert gate.chance_of_passing([many], 1) < 1e-6
    assert gate.chance_of_passing([many, record], 1) == gate.chance_of_passing([many], 1)
    numbers = np.random.default_rng(0).normal(size=(3, 400))
    error = gate.judge_resampled(gate.Terms("rmse", 0.1), gate.compare_values("rmse", *numbers), np.ones(400, bool))
    width = error.drop_upper - error.drop
    at_the_bound = msgspec.structs.replace(error, budget=error.drop + width / 2)
    assert gate.chance_of_passing([at_the_bound], 4) == pytest.approx(0.5)
    assert gate.chance_of_passing([msgspec.structs.replace(error, budget=0.0)], 4) < 0.5


@pytest.mark.parametrize(("lost", "won"), [(0.012, 0.012), (0.02, 0.01), (0.03, 0.03)])
def test_chance_is_how_often_the_gate_passes(lost, won):
    """Of models whose selection split looked so, about as many pass as were told: drawn from the prior, 25 changes."""
    chance, n, budget = np.random.default_rng(0), 1000, 0.02
    told, passed = [], []
    for _ in range(300):
        changed = lost + won
        better = chance.beta(12.5, 12.5)
        counts = [chance.multinomial(n, [changed * (1 - better), changed * better, 1 - changed]) for _ in range(2)]
        first, then = (_judged(int(one[0]), int(one[1]), n, budget) for one in counts)
        told.append(gate.chance_of_passing([first], 1.0))
        passed.append(then.verdict == "PASS")

    assert np.mean(told) == pytest.approx(np.mean(passed), abs=0.06)


def _judged(lost, won, n, budget):
    answers = np.arange(n)
    return gate.judge(np.zeros(n), np.where(answers < won, 1, 0), np.where(answers >= n - lost, 1, 0), budget=budget)
