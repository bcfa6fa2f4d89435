"""What training minimises, and what is measured of it, against PyTorch's and scikit-learn's definitions."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from bundle.errors import DataError
from bundle.manifest import Multiclass, Multilabel, Regression
from finetune import evaluate
from finetune.checkpoint import load_checkpoint
from finetune.config import TrainConfig
from finetune.data import load_dataset
from finetune.features import _as_student, _check_teacher, teacher_logits
from finetune.objective import Objective, make_objective, target_tensors
from finetune.target import Target
from finetune.train import prepare, train

COUNT = 60
TOPIC = Multiclass(name="topic", labels=("a", "b", "c"))
FACTS = Multilabel(name="facts", labels=("w", "x", "y", "z"))
SIZE = Regression(name="size", mean=20.0, std=5.0)
TASKS = (TOPIC, FACTS, SIZE)


def make_targets(missing=0.0, count=COUNT):
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 3, count)
    facts = rng.integers(0, 2, (count, 4)).astype(np.float32)
    size = rng.normal(20, 5, count)
    topic[rng.random(count) < missing] = -1
    facts[rng.random(count) < missing] = np.nan
    size[rng.random(count) < missing] = np.nan
    return (
        Target("topic", "multiclass", TOPIC.labels, topic),
        Target("facts", "multilabel", FACTS.labels, facts),
        Target("size", "regression", (), size),
    )


@pytest.fixture
def logits():
    return torch.randn(COUNT, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)


def alone(task, target, **options):
    """The objective of one task, the tensors of its target and their counts."""
    objective = Objective((task,), (1.0,), (options.pop("class_weights", None),), **options)
    tensors = target_tensors([target])
    return objective, tensors, objective.counts(tensors)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, np.array([0.5, 1.0, 4.0], np.float32)])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_loss_of_one_label_is_cross_entropy(logits, smoothing, weights, missing):
    """It is PyTorch's mean, weighted by class, over the examples with a label."""
    target = make_targets(missing)[0]
    objective, tensors, counts = alone(TOPIC, target, class_weights=weights, label_smoothing=smoothing)
    expected = functional.cross_entropy(
        logits[:, :3],
        tensors[0],
        None if weights is None else torch.from_numpy(weights),
        ignore_index=-1,
        label_smoothing=smoothing,
    )

    assert objective.loss(logits[:, :3], tensors, counts).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_losses_of_sets_and_numbers_are_pytorchs(logits, missing):
    """Mean binary cross-entropy of the labels, and mean squared error of the standardised value."""
    _, facts, size = make_targets(missing)
    for task, target, part, function, wanted in (
        (FACTS, facts, logits[:, 3:7], functional.binary_cross_entropy_with_logits, facts.values),
        (SIZE, size, logits[:, 7:], functional.mse_loss, (size.values[:, None] - 20) / 5),
    ):
        objective, tensors, counts = alone(task, target)
        expected = function(part[target.known], torch.from_numpy(wanted[target.known]).float())
        assert counts == [target.known.sum()]
        assert objective.loss(part, tensors, counts).item() == pytest.approx(expected.item(), rel=1e-6)


def everything(missing):
    """An objective with every option, its targets' tensors, and a teacher's logits."""
    weights = (np.array([0.5, 1.0, 4.0], np.float32), None, None)
    objective = Objective(TASKS, (1.0, 0.5, 2.0), weights, 0.1, 0.3, 2.0)
    teacher = torch.randn(COUNT, 8, generator=torch.Generator().manual_seed(1))
    return objective, target_tensors(make_targets(missing)), teacher


@pytest.mark.parametrize("parts", [1, 2, 7, COUNT])
@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_shares_of_a_step_add_up_to_it(logits, parts, missing):
    """However a step is cut into micro-batches and ranks, loss and gradient are those of the whole."""
    objective, targets, teacher = everything(missing)
    counts = objective.counts(targets)
    whole = objective.loss(logits, targets, counts, teacher)
    (expected,) = torch.autograd.grad(whole, logits)

    cuts = np.array_split(np.random.default_rng(0).permutation(COUNT), parts)
    shares = [objective.loss(logits[cut], [t[cut] for t in targets], counts, teacher[cut]) for cut in cuts]
    (gradient,) = torch.autograd.grad(sum(shares), logits)

    assert sum(share.item() for share in shares) == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_missing_label_teaches_nothing(logits):
    """Its logits get no gradient, not even a NaN, and a task that nobody has a label of adds nothing."""
    objective, targets, _ = everything(0.5)
    (gradient,) = torch.autograd.grad(objective.loss(logits, targets, objective.counts(targets)), logits)
    for target, span in zip(make_targets(0.5), (slice(0, 3), slice(3, 7), slice(7, 8)), strict=True):
        assert (gradient[~target.known, span] == 0).all()
        assert (gradient[target.known, span] != 0).all()

    nobody = [torch.full_like(targets[0], -1), *(torch.full_like(t, torch.nan) for t in targets[1:])]
    assert objective.counts(nobody) == [0, 0, 0]
    loss = objective.loss(logits, nobody, objective.counts(nobody))
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient == 0).all()


def test_loss_of_mixed_inputs_is_mixed(logits):
    """λ of the loss to one label and 1 - λ of that to the other, with the counts of the step as they are."""
    objective, targets, teacher = everything(0.3)
    counts = objective.counts(targets)
    permutation = torch.from_numpy(np.random.default_rng(0).permutation(COUNT))
    others = [target[permutation] for target in targets]

    mixed = objective.loss(logits, targets, counts, teacher, (permutation, 0.7))

    assert objective.counts(others) == counts
    expected = 0.7 * objective.loss(logits, targets, counts, teacher)
    expected = expected + 0.3 * objective.loss(logits, others, counts, teacher[permutation])
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_teacher_is_followed_at_its_temperature(logits, temperature):
    """KL divergence times T², binary cross-entropy to its probabilities, squared difference."""
    objective, targets, teacher = everything(0.0)
    objective = Objective(TASKS, (1.0, 1.0, 1.0), (None,) * 3, distill_weight=1.0, temperature=temperature)
    student, wanted = ((each[:, :3] / temperature).softmax(dim=1) for each in (logits, teacher))
    expected = (wanted * (wanted.log() - student.log())).sum(dim=1).mean() * temperature**2
    probability, believed = logits[:, 3:7].sigmoid(), teacher[:, 3:7].sigmoid()
    expected = expected - (believed * probability.log() + (1 - believed) * (1 - probability).log()).mean()
    expected = expected + (logits[:, 7] - teacher[:, 7]).square().mean()

    loss = objective.loss(logits, targets, objective.counts(targets), teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_half_precision_logits_are_summed_in_float32(logits):
    """Under autocast the loss is that of the rounded logits, not a rounded loss."""
    objective, targets, teacher = everything(0.3)
    rounded = logits.detach().bfloat16()
    counts = objective.counts(targets)

    loss = objective.loss(rounded, targets, counts, teacher)

    assert loss.dtype == torch.float32
    assert loss.item() == objective.loss(rounded.float(), targets, counts, teacher).item()


def configured(**options):
    return TrainConfig("mlp", "data.csv", out=Path("out"), **options)


@pytest.mark.parametrize(
    ("mode", "counts", "weighted"),
    [
        ("none", (100, 1, 9), False),
        ("balanced", (4, 3, 3), True),
        ("auto", (99, 10, 11), False),
        ("auto", (100, 10, 11), True),
    ],
)
def test_rare_labels_weigh_as_much_as_frequent_ones(mode, counts, weighted):
    """Balanced weights are scikit-learn's; auto takes them from ten to one on; missing labels do not count."""
    values = np.repeat([0, 1, 2, -1], (*counts, 50))
    targets = (Target("topic", "multiclass", TOPIC.labels, values), make_targets(count=len(values))[1])

    objective = make_objective(configured(class_weights=mode), (TOPIC, FACTS), (1.0, 2.0), targets)

    assert objective.class_weights[1] is None
    assert objective.weights == (1.0, 2.0)
    if weighted:
        expected = compute_class_weight("balanced", classes=np.arange(3), y=values[values >= 0])
        np.testing.assert_allclose(objective.class_weights[0], expected, rtol=1e-6)
        assert objective.class_weights[0].dtype == np.float32
    else:
        assert objective.class_weights[0] is None


def test_teachers_share_is_zero_without_a_teacher():
    """The option has a default, which must not take anything from the labels."""
    assert make_objective(configured(), (TOPIC,), (1.0,), make_targets()[:1]).distill_weight == 0
    with_teacher = configured(teacher=Path("teacher"), distill_weight=0.3)
    assert make_objective(with_teacher, (TOPIC,), (1.0,), make_targets()[:1]).distill_weight == 0.3


def test_teachers_logits_become_the_students():
    """Tasks may stand in another order, and a number is standardised anew."""
    teacher = (Regression(name="size", mean=10.0, std=2.0), FACTS, TOPIC)
    said = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)

    _check_teacher(Path("teacher"), teacher, TASKS)
    logits = _as_student(said, teacher, TASKS)

    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits[:, :3], said[:, 5:])
    np.testing.assert_array_equal(logits[:, 3:7], said[:, 1:5])
    np.testing.assert_allclose(logits[:, 7] * 5 + 20, said[:, 0] * 2 + 10, rtol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ((FACTS,), r"does not teach 'topic' \(multiclass\); it has 'facts' \(multilabel\)"),
        ((Multilabel(name="topic", labels=TOPIC.labels),), r"it has 'topic' \(multilabel\)"),
        ((Multiclass(name="topic", labels=("a", "c", "d")),), r"which lacks \['b'\] and has \['d'\] besides"),
    ],
)
def test_teacher_of_other_tasks_is_refused(teacher, message):
    """Its logits would mean something else."""
    with pytest.raises(DataError, match=message):
        _check_teacher(Path("teacher"), teacher, (TOPIC,))


def test_teachers_logits_are_computed_once(tmp_path, monkeypatch):
    """They are the checkpoint's own of the same raw examples, and the second time they come from the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(COUNT, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x[:, 0] > 0).astype(int))
    options = TrainConfig("mlp", str(tmp_path / "data.npz"), out=tmp_path / "teacher", widths=(4,), epochs=1)
    checkpoint = load_checkpoint(train(options).out)
    dataset = load_dataset(options.data, "vector")
    indices = np.array([5, 3, 40])

    def ask():
        device = torch.device("cpu")
        return teacher_logits(checkpoint.path, dataset, indices, checkpoint.spec.tasks, batch_size=2, device=device)

    first = ask()
    rows = [checkpoint.encode(dataset.raw(int(i))) for i in indices]
    expected = evaluate.logits(checkpoint.network, rows, checkpoint.spec.input, 2)
    np.testing.assert_array_equal(first, expected)
    monkeypatch.setattr(evaluate, "logits", None)
    np.testing.assert_array_equal(ask(), expected)


def test_teacher_is_not_cached_without_a_cache(tmp_path, monkeypatch):
    """--no-cache neither reads nor writes what a teacher says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x = np.random.default_rng(0).normal(size=(COUNT, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x[:, 0] > 0).astype(int))
    options = TrainConfig(
        "mlp", str(tmp_path / "data.npz"), out=tmp_path / "teacher", widths=(4,), epochs=1, cache=False
    )
    train(options)
    train(replace(options, out=tmp_path / "student", teacher=tmp_path / "teacher"))

    assert not (tmp_path / "cache").exists()


def test_another_start_is_another_training(tmp_path):
    """What is resumed began with the same weights and has the same teacher, whatever lies at these paths now."""
    x = np.random.default_rng(0).normal(size=(COUNT, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x[:, 0] > 0).astype(int))
    start = TrainConfig("mlp", str(tmp_path / "data.npz"), out=tmp_path / "start", widths=(4,), epochs=1)
    train(start)
    student = replace(start, out=tmp_path / "student", teacher=tmp_path / "start")
    grown = replace(start, model=f"checkpoint:{tmp_path / 'start'}", widths=(), out=tmp_path / "grown")
    before = [prepare(config).fingerprint for config in (student, grown)]
    assert [prepare(config).fingerprint for config in (student, grown)] == before

    shutil.rmtree(tmp_path / "start")
    train(replace(start, learning_rate=0.05))
    after = [prepare(config).fingerprint for config in (student, grown)]
    assert all(one != other for one, other in zip(before, after, strict=True))


def softmax(logits):
    return torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy()


def test_scores_of_one_label_are_scikit_learns():
    """Accuracy, balanced accuracy, macro F1 and loss, also for logits far from zero."""
    target = make_targets()[0]
    logits = np.random.default_rng(0).normal(scale=300, size=(COUNT, 3)).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        measured = evaluate.score([TOPIC], logits / 100, [target])
        assert np.isfinite(evaluate.score([TOPIC], logits, [target])["loss"])
    predicted = logits.argmax(axis=1)

    assert measured == {
        "accuracy": oracle.accuracy_score(target.values, predicted),
        "balanced_accuracy": pytest.approx(oracle.balanced_accuracy_score(target.values, predicted)),
        "macro_f1": pytest.approx(oracle.f1_score(target.values, predicted, average="macro")),
        "loss": pytest.approx(oracle.log_loss(target.values, softmax(logits / 100)), rel=1e-5),
    }


def test_scores_of_sets_are_scikit_learns():
    """Exact match, both F1 and the mean of the labels' log losses, at the task's own threshold."""
    task = Multilabel(name="facts", labels=FACTS.labels, threshold=0.4)
    target = make_targets()[1]
    logits = np.random.default_rng(0).normal(scale=3, size=(COUNT, 4)).astype(np.float32)
    believed = 1 / (1 + np.exp(-logits.astype(np.float64)))
    predicted = believed >= 0.4

    assert evaluate.score([task], logits, [target]) == {
        "accuracy": oracle.accuracy_score(target.values, predicted),
        "macro_f1": pytest.approx(oracle.f1_score(target.values, predicted, average="macro")),
        "micro_f1": pytest.approx(oracle.f1_score(target.values, predicted, average="micro")),
        "loss": pytest.approx(
            np.mean([oracle.log_loss(target.values[:, c], believed[:, c]) for c in range(4)]), rel=1e-5
        ),
    }
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(evaluate.score([task], logits * 1000, [target])["loss"])


def test_scores_of_numbers_are_in_the_units_of_the_data():
    """The logits are standardised, what is measured is not; only the loss is."""
    target = make_targets()[2]
    logits = np.random.default_rng(0).normal(size=(COUNT, 1)).astype(np.float32)
    predicted = logits[:, 0] * 5 + 20

    assert evaluate.score([SIZE], logits, [target]) == {
        "rmse": pytest.approx(oracle.root_mean_squared_error(target.values, predicted), rel=1e-6),
        "mae": pytest.approx(oracle.mean_absolute_error(target.values, predicted), rel=1e-6),
        "r2": pytest.approx(oracle.r2_score(target.values, predicted), rel=1e-6),
        "loss": pytest.approx(oracle.mean_squared_error((target.values - 20) / 5, logits[:, 0]), rel=1e-6),
    }


def test_scores_of_several_tasks_are_those_of_each_on_what_is_known(logits):
    """Names carry the task, examples without a label do not count, and the loss is the objective's."""
    targets = make_targets(0.4)
    said = logits.detach().numpy()
    measured = evaluate.score(TASKS, said, targets, (1.0, 0.5, 2.0))

    for task, target, span in zip(TASKS, targets, (slice(0, 3), slice(3, 7), slice(7, 8)), strict=True):
        known = np.flatnonzero(target.known)
        for name, value in evaluate.score([task], said[known, span], [target.take(known)]).items():
            assert measured[f"{task.name}.{name}"] == value
    assert set(measured) == set(evaluate.metric_names(TASKS))
    objective = Objective(TASKS, (1.0, 0.5, 2.0), (None,) * 3)
    tensors = target_tensors(targets)
    expected = objective.loss(logits, tensors, objective.counts(tensors)).item()
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("task", "known"), [(0, 0), (1, 0), (2, 1)])
def test_task_without_labels_cannot_be_measured(task, known):
    """Too few labels are an error with the counts in it, not a NaN."""
    target = make_targets()[task]
    values = target.values.astype(np.float32 if task else np.int64)
    values[known:] = np.nan if task else -1
    target = Target(target.name, target.kind, target.labels, values)

    with pytest.raises(DataError, match=f"{known} of {COUNT} examples have a value of '{target.name}'"):
        evaluate.score([TASKS[task]], np.zeros((COUNT, target.width), np.float32), [target])


def test_metrics_have_names_a_direction_and_a_default():
    """Errors are to be small and everything else large; an unknown name is answered with the known ones."""
    assert [evaluate.main_metric([task]) for task in TASKS] == ["accuracy", "macro_f1", "rmse"]
    assert evaluate.main_metric(TASKS) == "loss"
    for metric in ("accuracy", "topic.balanced_accuracy", "facts.micro_f1", "r2"):
        assert evaluate.better(metric, 0.9, 0.8)
        assert not evaluate.better(metric, 0.8, 0.8)
    for metric in ("loss", "size.rmse", "mae"):
        assert evaluate.better(metric, 0.8, 0.9)
        assert not evaluate.better(metric, 0.8, 0.8)
    for tasks in ([TOPIC], [FACTS], [SIZE], TASKS):
        evaluate.check_metric(evaluate.main_metric(tasks), tasks)
    with pytest.raises(DataError, match="'f1' is no metric of this data; there are accuracy, balanced_accuracy, "):
        evaluate.check_metric("f1", [TOPIC])
