"""The linear probe against scikit-learn, and the cache of features."""

import os

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, log_loss
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from bundle.errors import DataError, TrainingDiverged
from bundle.log import captured
from bundle.manifest import Multiclass, Regression
from finetune import evaluate
from finetune.cache import cached
from finetune.probe import L2_GRID, fit_head
from finetune.target import Target


@pytest.fixture(autouse=True)
def one_thread():
    """scikit-learn's small matrix products are slowed down many times by threads that wait for a shared core."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def digits():
    """1,000 examples to fit and 797 to judge: features float32 with constant columns among them, labels."""
    data = load_digits()
    features = data.data.astype(np.float32)
    return features[:1000], data.target[:1000], features[1000:], data.target[1000:]


def classes(values, count, name="label"):
    return Target(name, "multiclass", tuple(map(str, range(count))), np.asarray(values, np.int64))


def sets(values, name="label"):
    return Target(name, "multilabel", tuple(map(str, range(values.shape[1]))), np.asarray(values, np.float32))


def numbers(values, name="label"):
    return Target(name, "regression", (), np.asarray(values, np.float64))


def fit(x, target, held_out, truth, **options):
    """One task's head."""
    return fit_head(x, [target], held_out, [truth], [target.task(np.arange(len(x)))], **options)


def fit_classes(x, y, held_out, truth, count, **options):
    return fit(x, classes(y, count), held_out, classes(truth, count), **options)


def standardised(x):
    """Mean and floored spread of the columns, as the probe has them."""
    variance = x.var(axis=0, dtype=np.float64)
    return x.mean(axis=0, dtype=np.float64), np.maximum(np.sqrt(variance), 0.1 * np.sqrt(variance.mean()))


def objective(logits, labels, weight, l2):
    return log_loss(labels, logits_to_probabilities(logits)) + 0.5 * l2 * np.square(weight).sum()


def logits_to_probabilities(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-3])
def test_probe_finds_scikit_learns_solution(digits, l2):
    """At the same penalty the objective is as low as scikit-learn's, and the probabilities are the same."""
    x, y, held_out, truth = digits
    head = fit_classes(x, y, held_out, truth, 10, l2_grid=[l2])
    mean, scale = standardised(x)
    z, held_out_z = (x - mean) / scale, (held_out - mean) / scale
    oracle = LogisticRegression(C=1 / (l2 * len(x)), solver="newton-cholesky", tol=1e-8).fit(z, y)

    ours = objective(x @ head.weight.T + head.bias, y, head.weight * scale, l2)
    theirs = objective(oracle.decision_function(z), y, oracle.coef_, l2)
    assert ours == pytest.approx(theirs, rel=1e-5)
    np.testing.assert_allclose(
        logits_to_probabilities(held_out @ head.weight.T + head.bias), oracle.predict_proba(held_out_z), atol=1e-2
    )


def test_features_that_hardly_vary_leave_int8_its_bits(digits):
    """Columns of faint noise do not get weights that dwarf all others, which int8 could not hold."""
    x, y, held_out, truth = digits
    noise = np.random.default_rng(0).normal(scale=1e-4, size=(len(x) + len(held_out), 50)).astype(np.float32)
    x, held_out = np.hstack([x, noise[: len(x)]]), np.hstack([held_out, noise[len(x) :]])
    head = fit_classes(x, y, held_out, truth, 10)
    step = np.abs(head.weight).max(axis=1, keepdims=True) / 127
    coarse = np.round(head.weight / step) * step

    whole = accuracy_score(truth, (held_out @ head.weight.T + head.bias).argmax(axis=1))
    assert accuracy_score(truth, (held_out @ coarse.T + head.bias).argmax(axis=1)) >= whole - 0.01


def test_chosen_penalty_is_no_worse_than_scikit_learns_default(digits):
    """The probe's accuracy on data that it never saw is that of StandardScaler and LogisticRegression, or better."""
    x, y, rest, truth = digits
    head = fit_classes(x[:800], y[:800], x[800:], y[800:], 10)
    oracle = LogisticRegression(solver="newton-cholesky").fit(StandardScaler().fit(x).transform(x), y)

    ours = accuracy_score(truth, (rest @ head.weight.T + head.bias).argmax(axis=1))
    theirs = oracle.score(StandardScaler().fit(x).transform(rest), truth)

    assert ours >= theirs - 0.01  # 8 of 797


def test_two_labels_are_no_special_case():
    """A binary problem is fitted as well as scikit-learn fits it."""
    data = load_breast_cancer()
    x, y = StandardScaler().fit_transform(data.data).astype(np.float32), data.target  # of one scale, as features are
    head = fit_classes(x[:400], y[:400], x[400:], y[400:], 2)
    scaler = StandardScaler().fit(x[:400])
    theirs = (
        LogisticRegression(solver="newton-cholesky")
        .fit(scaler.transform(x[:400]), y[:400])
        .score(scaler.transform(x[400:]), y[400:])
    )

    assert accuracy_score(y[400:], (x[400:] @ head.weight.T + head.bias).argmax(axis=1)) >= theirs - 0.01


def test_penalty_is_chosen_by_validation(digits):
    """Every penalty is tried, and the chosen one has the least loss, which is less a matter of luck than accuracy."""
    head = fit_classes(*digits, 10)

    assert [trial["l2"] for trial in head.trials] == sorted(L2_GRID, reverse=True)
    best = min(head.trials, key=lambda trial: trial["loss"])
    assert head.l2 == (best["l2"],)
    logits = digits[2] @ head.weight.T + head.bias
    target = classes(digits[3], 10)
    assert {"l2": best["l2"], **evaluate.score([target.task(np.arange(797))], logits, [target])} == pytest.approx(
        best, rel=1e-4
    )


@pytest.fixture(scope="module")
def labelled(digits):
    """The digits' features with the digit, what holds of it, and a number that hangs on it; of the first 1,000."""
    x, y, _, _ = digits
    rng = np.random.default_rng(0)
    several = np.stack([y % 2 == 0, y > 4, y == 3], axis=1) ^ (rng.random((1000, 3)) < 0.05)
    return x, y, several, 40 + 3 * y + rng.normal(size=1000)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-3])
def test_probe_of_sets_of_labels_is_one_logistic_regression_each(labelled, l2):
    """Every label's probabilities are those of scikit-learn's regression on it alone."""
    x, _, several, _ = labelled
    head = fit(x[:700], sets(several[:700]), x[700:], sets(several[700:]), l2_grid=[l2])
    mean, scale = standardised(x[:700])
    ours = 1 / (1 + np.exp(-(x[700:] @ head.weight.T + head.bias)))

    for label in range(3):
        oracle = LogisticRegression(C=1 / (l2 * 700), solver="newton-cholesky", tol=1e-8)
        oracle.fit((x[:700] - mean) / scale, several[:700, label])
        np.testing.assert_allclose(ours[:, label], oracle.predict_proba((x[700:] - mean) / scale)[:, 1], atol=1e-2)


@pytest.mark.parametrize("l2", L2_GRID)
def test_probe_of_a_number_is_ridge_regression(labelled, l2):
    """At every penalty the values are scikit-learn's."""
    x, _, _, values = labelled
    target = numbers(values[:700])
    head = fit(x[:700], target, x[700:], numbers(values[700:]), l2_grid=[l2])
    mean, scale = standardised(x[:700])
    task = target.task(np.arange(700))
    oracle = Ridge(alpha=l2 * 700).fit((x[:700] - mean) / scale, (values[:700] - task.mean) / task.std)

    np.testing.assert_allclose(
        x[700:] @ head.weight.T.ravel() + head.bias, oracle.predict((x[700:] - mean) / scale), rtol=0, atol=1e-5
    )


def test_several_tasks_are_fitted_each_on_what_is_known_of_it(labelled):
    """A head of three tasks is the three heads that each would have alone, on the examples that have its label."""
    x, y, several, values = labelled
    rng = np.random.default_rng(1)
    y, several, values = y.copy(), several.astype(np.float32), values.copy()
    y[rng.random(1000) < 0.3], several[rng.random(1000) < 0.3], values[rng.random(1000) < 0.3] = -1, np.nan, np.nan
    targets = classes(y, 10, "digit"), sets(several, "facts"), numbers(values, "size")
    tasks = [target.task(np.arange(700)) for target in targets]
    known, held_out = ([target.take(part) for target in targets] for part in (np.arange(700), np.arange(700, 1000)))
    grid = [1.0, 1e-2]

    together = fit_head(x[:700], known, x[700:], held_out, tasks, grid)

    assert together.weight.shape == (14, 64)
    assert together.bias.shape == (14,)
    assert together.weight.dtype == together.bias.dtype == np.float32
    for i, span in enumerate((slice(0, 10), slice(10, 13), slice(13, 14))):
        rows, others = known[i].known, held_out[i].known
        alone = fit_head(
            x[:700][rows],
            [known[i].take(np.flatnonzero(rows))],
            x[700:][others],
            [held_out[i].take(np.flatnonzero(others))],
            [tasks[i]],
            grid,
        )
        np.testing.assert_array_equal(together.weight[span], alone.weight)
        np.testing.assert_array_equal(together.bias[span], alone.bias)
        assert together.l2[i] == alone.l2[0]
        for mine, expected in zip(together.trials, alone.trials, strict=True):
            assert mine[f"{tasks[i].name}.loss"] == pytest.approx(expected["loss"], rel=1e-9)


def test_task_without_a_label_to_train_on_is_refused(labelled):
    """There is nothing to fit, which is an error that names the task."""
    x, y, _, _ = labelled
    targets = [classes(y, 10, "digit"), numbers(np.full(1000, np.nan), "size")]
    tasks = [Multiclass(name="digit", labels=targets[0].labels), Regression(name="size", mean=0, std=1)]

    with pytest.raises(DataError, match="none of the 1000 examples to train on has a value of 'size'"):
        fit_head(x, targets, x, targets, tasks)


def test_features_that_are_not_finite_are_refused(digits):
    """A NaN among the features is an error, not a head."""
    broken = digits[0].copy()
    broken[[3, 5], 7] = np.nan

    with pytest.raises(TrainingDiverged, match="features of 2 examples are not finite"):
        fit_classes(broken, *digits[1:], 10)


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "edgeward" / "features"


def never():
    raise AssertionError("computed again")


def test_cache_gives_back_what_was_computed(cache_folder):
    """The second time nothing is computed, and the array is the same, type and shape included."""
    array = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert cached("ab", lambda: array) is array

    again = cached("ab", never)

    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, array)
    assert [path.name for path in cache_folder.iterdir()] == ["ab.features"]


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d[:50] + b"?" + d[51:], lambda d: b"", lambda d: d[:20]]
)
def test_damaged_cache_is_computed_again(cache_folder, damage):
    """A file that was cut or changed is never used, and is replaced."""
    array = np.arange(1000, dtype=np.float32).reshape(100, 10)
    cached("ab", lambda: array)
    path = cache_folder / "ab.features"
    path.write_bytes(damage(path.read_bytes()))

    with captured() as logs:
        np.testing.assert_array_equal(cached("ab", lambda: array + 1), array + 1)
    assert logs[0]["level"] == "warning"
    np.testing.assert_array_equal(cached("ab", never), array + 1)


def test_cache_is_capped(cache_folder):
    """Entries that were used longest ago go first; one that was just used stays."""
    array = np.zeros((1000, 1), np.float32)  # 4,160 bytes as a file
    for age, key in enumerate(["aa", "bb", "cc"]):
        cached(key, lambda: array)
        os.utime(cache_folder / f"{key}.features", (age, age))
    cached("aa", never)

    cached("dd", lambda: array, max_bytes=2 * 4160)

    assert sorted(path.stem for path in cache_folder.iterdir()) == ["aa", "dd"]


def test_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    """A cache folder that is a file only costs the next run its time."""
    (tmp_path / "edgeward").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with captured() as logs:
        assert cached("ab", lambda: np.zeros(3)).shape == (3,)
    assert logs[0]["event"] == "features were not cached"
