"""The linear probe against scikit-learn, and the cache of features."""

import os

import numpy as np
import pytest
import structlog
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from bundle.errors import TrainingDiverged
from finetune import evaluate
from finetune.cache import cached
from finetune.probe import L2_GRID, fit_head


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


def objective(logits, labels, weight, l2):
    return log_loss(labels, logits_to_probabilities(logits)) + 0.5 * l2 * np.square(weight).sum()


def logits_to_probabilities(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-3])
def test_probe_finds_scikit_learns_solution(digits, l2):
    """At the same penalty the objective is as low as scikit-learn's, and the probabilities are the same."""
    x, y, held_out, truth = digits
    head = fit_head(x, y, held_out, truth, 10, l2_grid=[l2])
    scale = np.maximum(x.std(axis=0, dtype=np.float64), 0.1 * np.sqrt(x.var(axis=0, dtype=np.float64).mean()))
    mean = x.mean(axis=0, dtype=np.float64)
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
    head = fit_head(x, y, held_out, truth, 10)
    step = np.abs(head.weight).max(axis=1, keepdims=True) / 127
    coarse = np.round(head.weight / step) * step

    whole = accuracy_score(truth, (held_out @ head.weight.T + head.bias).argmax(axis=1))
    assert accuracy_score(truth, (held_out @ coarse.T + head.bias).argmax(axis=1)) >= whole - 0.01


def test_chosen_penalty_is_no_worse_than_scikit_learns_default(digits):
    """The probe's accuracy on data that it never saw is that of StandardScaler and LogisticRegression, or better."""
    x, y, rest, truth = digits
    head = fit_head(x[:800], y[:800], x[800:], y[800:], 10)
    oracle = LogisticRegression(solver="newton-cholesky").fit(StandardScaler().fit(x).transform(x), y)

    ours = accuracy_score(truth, (rest @ head.weight.T + head.bias).argmax(axis=1))
    theirs = oracle.score(StandardScaler().fit(x).transform(rest), truth)

    assert ours >= theirs - 0.01  # 8 of 797


def test_two_labels_are_no_special_case():
    """A binary problem is fitted as well as scikit-learn fits it."""
    data = load_breast_cancer()
    x, y = StandardScaler().fit_transform(data.data).astype(np.float32), data.target  # of one scale, as features are
    head = fit_head(x[:400], y[:400], x[400:], y[400:], 2)
    scaler = StandardScaler().fit(x[:400])
    theirs = (
        LogisticRegression(solver="newton-cholesky")
        .fit(scaler.transform(x[:400]), y[:400])
        .score(scaler.transform(x[400:]), y[400:])
    )

    assert accuracy_score(y[400:], (x[400:] @ head.weight.T + head.bias).argmax(axis=1)) >= theirs - 0.01


def test_penalty_is_chosen_by_validation(digits):
    """Every penalty is tried, and the chosen one has the least loss, which is less a matter of luck than accuracy."""
    head = fit_head(*digits, 10)

    assert [trial.l2 for trial in head.trials] == sorted(L2_GRID, reverse=True)
    best = min(head.trials, key=lambda trial: trial.loss)
    assert head.l2 == best.l2
    logits = digits[2] @ head.weight.T + head.bias
    assert evaluate.score(logits, digits[3]) == pytest.approx(
        {"accuracy": best.accuracy, "macro_f1": best.macro_f1, "loss": best.loss}, rel=1e-4
    )


def test_scores_are_scikit_learns(digits):
    """Accuracy, macro F1 and loss are scikit-learn's, also for logits far from zero."""
    logits = np.random.default_rng(0).normal(scale=300, size=(797, 10))
    with np.errstate(all="raise", under="ignore"):
        measured = evaluate.score(logits / 100, digits[3])
        assert np.isfinite(evaluate.score(logits, digits[3])["loss"])

    assert measured["accuracy"] == accuracy_score(digits[3], logits.argmax(axis=1))
    assert measured["macro_f1"] == pytest.approx(f1_score(digits[3], logits.argmax(axis=1), average="macro"))
    assert measured["loss"] == pytest.approx(log_loss(digits[3], logits_to_probabilities(logits / 100)), rel=1e-5)


def test_features_that_are_not_finite_are_refused(digits):
    """A NaN among the features is an error, not a head."""
    broken = digits[0].copy()
    broken[[3, 5], 7] = np.nan

    with pytest.raises(TrainingDiverged, match="features of 2 examples are not finite"):
        fit_head(broken, *digits[1:], 10)


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

    with structlog.testing.capture_logs() as logs:
        np.testing.assert_array_equal(cached("ab", lambda: array + 1), array + 1)
    assert logs[0]["log_level"] == "warning"
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

    with structlog.testing.capture_logs() as logs:
        assert cached("ab", lambda: np.zeros(3)).shape == (3,)
    assert logs[0]["event"] == "features were not cached"
