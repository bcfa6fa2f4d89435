"""The training loop on tiny networks: what it learns, what it leaves alone, and that it is exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bundle.errors import DataError, TrainingDiverged
from bundle.manifest import TextInput
from finetune import evaluate
from finetune.loop import Examples, fit
from finetune.order import batches_of_epoch, data_order
from finetune.recipe import make_optimizer, rate_factor
from finetune.target import Target
from finetune.weights import freeze, set_modes
from tests.finetune_loops import (
    CPU,
    IMAGE,
    RECIPE,
    VECTOR,
    image_network,
    multiclass,
    objective,
    vector_network,
    vectors,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(network):
    return [name for name, _ in network.named_parameters()]


def train_vectors(network, recipe=RECIPE, train=None, validation=None, **options):
    train, validation = train or vectors(60), validation or vectors(20, seed=1)
    options.setdefault("trainable", names(network))
    return fit(network, train, validation, VECTOR, objective(*train.targets), recipe, CPU, **options)


def images(count, seed=0):
    chance = np.random.default_rng(seed)
    labels = chance.integers(2, size=count)
    rows = [(chance.integers(0, 160, (8, 8, 3)) + 90 * label).astype(np.uint8) for label in labels]
    return Examples(rows, (multiclass(labels, 2),))


def train_images(network, recipe, **options):
    train, validation = images(30), images(10, seed=1)
    options.setdefault("trainable", names(network))
    return fit(network, train, validation, IMAGE, objective(*train.targets), recipe, CPU, **options)


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_it_learns():
    """A small network learns which number of a vector is the largest, and is left in eval mode."""
    network = vector_network()
    history = train_vectors(network, replace(RECIPE, epochs=20), train=vectors(300))

    assert history[-1]["accuracy"] > 0.9
    assert history[0]["train_loss"] > 3 * history[-1]["train_loss"]
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_runs_give_the_same_weights(optimizer):
    """The weights are a function of data and seed, with dropout, mixup, a running average and another seed outside."""
    recipe = replace(RECIPE, optimizer=optimizer, mixup=0.4, ema=0.9)
    first, second, third = image_network(), image_network(), image_network()
    train_images(first, recipe)
    torch.manual_seed(1234)
    train_images(second, recipe)
    train_images(third, replace(recipe, seed=1))

    assert_equal(state(first), state(second))
    assert all(parameter.is_contiguous() for parameter in first.parameters())
    assert not torch.equal(first.head.weight, third.head.weight)


def test_global_generator_is_untouched():
    """Training draws no number from the generators of whoever calls it."""
    before = torch.get_rng_state()
    train_images(image_network(), replace(RECIPE, epochs=1))

    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_is_frozen():
    """With the last block trained, every other tensor is bit-equal after it, running means included."""
    network = image_network()
    before = state(network)
    trained = [
        "backbone.1.0.weight",
        "backbone.1.0.bias",
        "backbone.1.1.weight",
        "backbone.1.1.bias",
        *names(network)[-2:],
    ]
    train_images(network, replace(RECIPE, optimizer="sgd", weight_decay=0.1), trainable=trained)
    after = state(network)

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    means = {f"backbone.1.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == {*trained, *means}


def test_head_alone_leaves_the_backbone():
    """With the head trained, no tensor of the backbone changes, and its dropout is off."""
    network = image_network()
    before = state(network)
    train_images(network, RECIPE, trainable=["head.weight", "head.bias"])
    after = state(network)

    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}


def test_modes_follow_the_parameters():
    """A module trains when a parameter in it does; dropout and running means without parameters as what they are in."""
    network = image_network()
    network.backbone.append(nn.BatchNorm1d(24, affine=False))
    freeze(network, ["backbone.1.0.weight", "head.weight", "head.bias"])
    set_modes(network)
    assert [module.training for module in network.backbone] == [False, True, True, True, True, False]
    assert [module.training for module in network.backbone[1]] == [True, False, True]

    freeze(network, names(network))
    set_modes(network)
    assert all(module.training for module in network.modules())

    freeze(network, ["head.weight"])
    set_modes(network)
    assert [network.training, network.dropout.training, network.head.training] == [True] * 3
    assert not any(module.training for module in network.backbone.modules())


def missing_labels(count, seed=0):
    """Two tasks, each without labels of some examples."""
    chance = np.random.default_rng(seed)
    examples = vectors(count, seed)
    classes = np.where(chance.random(count) < 0.4, -1, examples.targets[0].values)
    numbers = np.where(chance.random(count) < 0.4, np.nan, np.stack(examples.rows)[:, 0] * 5 + 2)
    return Examples(examples.rows, (multiclass(classes), Target("number", "regression", (), numbers)))


def test_accumulation_is_one_large_batch():
    """Two batches of 4 make the same steps as one of 8, to rounding, though labels are missing unevenly."""
    train, validation = missing_labels(32), missing_labels(16, seed=1)
    whole, parts = vector_network(4), vector_network(4)
    recipe = replace(RECIPE, optimizer="sgd", learning_rate=0.1, epochs=2)
    first = train_vectors(whole, recipe, train, validation)
    second = train_vectors(parts, replace(recipe, batch_size=4, accumulate=2), train, validation)

    for name, tensor in state(whole).items():
        torch.testing.assert_close(state(parts)[name], tensor, rtol=1e-4, atol=1e-6)
    assert first[-1]["train_loss"] == pytest.approx(second[-1]["train_loss"], rel=1e-4)


def test_train_loss_is_the_mean_over_the_examples():
    """With a learning rate of next to nothing, the train loss is what the network's loss is."""
    network, train = vector_network(), vectors(37)
    loss = evaluate.score(objective(*train.targets).tasks, evaluate.logits(network, train.rows, VECTOR), train.targets)
    history = train_vectors(network, replace(RECIPE, learning_rate=1e-12, epochs=1, weight_decay=0.0), train)

    assert history[0]["train_loss"] == pytest.approx(loss["loss"], rel=1e-5)


def test_best_epoch_is_kept():
    """The network that is left measures as the best epoch did, which a rate far too high keeps from being the last."""
    network = vector_network()
    validation = vectors(20, seed=1)
    history = train_vectors(network, replace(RECIPE, epochs=8, learning_rate=0.5, schedule="constant", metric="loss"))
    logits = evaluate.logits(network, validation.rows, VECTOR)
    best = min(history, key=lambda epoch: epoch["loss"])

    assert best["epoch"] < 8
    assert evaluate.score(objective(*validation.targets).tasks, logits, validation.targets)["loss"] == best["loss"]


def test_ties_go_to_the_lower_loss():
    """Of epochs with the same accuracy the one with the least loss is kept."""
    network = vector_network()
    history = train_vectors(network, replace(RECIPE, epochs=6, learning_rate=1e-5, schedule="constant"))
    validation = vectors(20, seed=1)
    logits = evaluate.logits(network, validation.rows, VECTOR)
    measured = evaluate.score(objective(*validation.targets).tasks, logits, validation.targets)

    top = max(epoch["accuracy"] for epoch in history)
    assert sum(epoch["accuracy"] == top for epoch in history) > 1
    assert measured["loss"] == min(epoch["loss"] for epoch in history if epoch["accuracy"] == top)


def test_patience_stops():
    """Training ends after so many epochs without a better one."""
    history = train_vectors(
        vector_network(), replace(RECIPE, epochs=30, learning_rate=0.5, schedule="constant", metric="loss", patience=2)
    )
    losses = [epoch["loss"] for epoch in history]

    assert len(history) == losses.index(min(losses)) + 3 < 30


def test_average_is_what_is_kept():
    """With a running average, what is validated and kept is the average, not the weights that the steps moved."""
    plain, averaged = image_network(), image_network()
    recipe = replace(RECIPE, epochs=1, optimizer="sgd", learning_rate=0.1)
    train_images(plain, recipe)
    history = train_images(averaged, replace(recipe, ema=0.99))
    validation = images(10, seed=1)
    logits = evaluate.logits(averaged, validation.rows, IMAGE)
    start, end = image_network().head.weight, plain.head.weight

    assert torch.norm(averaged.head.weight - start) < torch.norm(end - start)
    assert not torch.equal(averaged.backbone[0][1].running_mean, plain.backbone[0][1].running_mean)
    assert (
        evaluate.score(objective(*validation.targets).tasks, logits, validation.targets)["loss"] == history[0]["loss"]
    )


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_nan_is_an_error(optimizer):
    """A loss that is no number stops the training, and the message says where and what to try."""
    recipe = replace(
        RECIPE, optimizer=optimizer, learning_rate=1e30, schedule="constant", max_gradient_norm=float("inf")
    )
    with pytest.raises(TrainingDiverged, match=r"became (nan|inf) in epoch 1, step \d.*lower learning rate"):
        train_vectors(vector_network(), recipe)


def test_wrong_options_are_errors():
    """An unknown metric, and mixup of what is no image, are refused before anything is trained."""
    with pytest.raises(DataError, match=r"precision.*accuracy"):
        train_vectors(vector_network(), replace(RECIPE, metric="precision"))
    with pytest.raises(DataError, match="mixup"):
        train_vectors(vector_network(), replace(RECIPE, mixup=0.2))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_and_stays_fp32(precision):
    """With autocast the weights stay float32, and the network learns."""
    network = vector_network()
    history = train_vectors(network, replace(RECIPE, epochs=10, precision=precision), train=vectors(200))

    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert history[-1]["accuracy"] > 0.7


def test_teacher_is_learned_from():
    """With the whole loss the teacher's, the network learns what the teacher says instead of the labels."""
    train = vectors(200)
    wrong = (train.targets[0].values + 1) % 3
    teacher = 8 * np.eye(3, dtype=np.float32)[wrong]
    network = vector_network()
    fit(
        network,
        Examples(train.rows, train.targets, teacher),
        vectors(20, seed=1),
        VECTOR,
        objective(*train.targets, distill_weight=1.0),
        replace(RECIPE, epochs=10, metric="loss", optimizer="adamw"),
        CPU,
        trainable=names(network),
    )
    logits = evaluate.logits(network, train.rows, VECTOR)

    first_epoch_only = (logits.argmax(axis=1) == wrong).mean()
    assert first_epoch_only > (logits.argmax(axis=1) == train.targets[0].values).mean()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rate_rises_and_falls(schedule):
    """The learning rate rises over the warm-up to its peak and follows its schedule to just above 0."""
    factors = [rate_factor(step, 100, 0.1, schedule) for step in range(100)]

    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1.0
    after = {
        "linear": [1 - i / 90 for i in range(90)],
        "cosine": [(1 + np.cos(np.pi * i / 90)) / 2 for i in range(90)],
        "constant": [1.0] * 90,
    }
    assert factors[10:] == pytest.approx(after[schedule])
    assert min(factors) > 0
    assert rate_factor(0, 3, 1.0, schedule) > 0


def test_biases_and_norms_do_not_decay():
    """Weight decay is that of matrices and kernels alone, and each block has its own rate."""
    network = image_network()
    optimizer = make_optimizer(network, replace(RECIPE, layer_decay=0.5, weight_decay=0.3))
    options = {
        id(p): (group["weight_decay"], group["factor"]) for group in optimizer.param_groups for p in group["params"]
    }
    found = {name: options[id(parameter)] for name, parameter in network.named_parameters()}

    assert found["backbone.0.0.weight"] == (0.3, 0.25)
    assert found["backbone.0.1.weight"] == found["backbone.0.0.bias"] == (0.0, 0.25)
    assert found["backbone.1.0.weight"] == (0.3, 0.5)
    assert found["head.weight"] == (0.3, 1.0)
    assert found["head.bias"] == (0.0, 1.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_plain_torch(momentum):
    """One epoch moves the weights as the textbook's loop does."""
    train = vectors(24)
    ours, plain = vector_network(), vector_network()
    recipe = replace(
        RECIPE, epochs=1, optimizer="sgd", momentum=momentum, learning_rate=0.1, weight_decay=0.0, max_gradient_norm=0.5
    )
    train_vectors(ours, recipe, train)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=momentum)
    inputs, labels = torch.from_numpy(np.stack(train.rows)), torch.from_numpy(train.targets[0].values)
    for step, batch in enumerate(np.array_split(data_order(0, 0, 24), 3)):
        optimizer.param_groups[0]["lr"] = 0.1 * rate_factor(step, 3, 0.1, "linear")
        loss = nn.functional.cross_entropy(plain(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()

    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_order_is_a_function_of_seed_and_epoch():
    """Each epoch has its own permutation, the same every time, and it is held to the numbers that it had."""
    assert sorted(data_order(0, 0, 50)) == list(range(50))
    np.testing.assert_array_equal(data_order(3, 4, 50), data_order(3, 4, 50))
    assert data_order(0, 0, 50).tolist() != data_order(0, 1, 50).tolist() != data_order(1, 1, 50).tolist()
    assert data_order(0, 0, 8).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_batches_are_of_similar_length():
    """Texts are batched with others of their length; every text is in one batch, and epochs differ in their batches."""
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    plain, alike = (batches_of_epoch(0, 0, 1000, 8, each) for each in (None, lengths))
    padded = [sum(len(batch) * lengths[batch].max() for batch in batches) for batches in (plain, alike)]

    assert len(plain) == len(alike) == 125
    assert sorted(np.concatenate(alike)) == list(range(1000))
    assert {len(batch) for batch in alike} == {8}
    assert padded[1] < 1.1 * lengths.sum() < 0.7 * padded[0]
    assert [batch.tolist() for batch in alike] == [batch.tolist() for batch in batches_of_epoch(0, 0, 1000, 8, lengths)]
    again = {frozenset(batch.tolist()) for batch in batches_of_epoch(0, 1, 1000, 8, lengths)}
    assert not again & {frozenset(batch.tolist()) for batch in alike}


@pytest.mark.parametrize(("examples", "batch_size", "sizes"), [(9, 8, [4, 5]), (7, 8, [7]), (17, 4, [3, 3, 3, 4, 4])])
def test_no_batch_is_left_over(examples, batch_size, sizes):
    """Batches differ by one example at most, with lengths too."""
    for lengths in (None, list(range(examples))):
        batches = batches_of_epoch(0, 0, examples, batch_size, lengths)
        assert sorted(len(batch) for batch in batches) == sizes


def test_texts_are_grouped():
    """The loop groups texts by their length: no batch of a text input is padded to more than its own."""
    spec = TextInput(column="text", max_length=64, pad_id=0, buckets=(64,))
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(100, 4)

        def forward(self, ids, mask):
            if self.training:
                seen.append((ids.shape[1], int(mask.sum(dim=1).min())))
            return (self.embedding(ids) * mask.unsqueeze(-1)).sum(1)

    network = vector_network()
    network.backbone, network.head = Recorder(), nn.Linear(4, 3)
    network.features = lambda *inputs: network.backbone(*inputs)
    network.forward = lambda *inputs: network.head(network.features(*inputs))
    rows = [np.ones(1 + i % 60, np.int64) for i in range(400)]
    examples = Examples(rows, (multiclass(np.arange(400) % 3),))
    fit(network, examples, examples, spec, objective(*examples.targets), replace(RECIPE, epochs=1), CPU,
        trainable=names(network))  # fmt: skip

    assert len(seen) == 50
    assert np.mean([longest - shortest for longest, shortest in seen]) < 8
