"""The whole stage on real digits and tweets: what is written, that it repeats, and what leaves nothing behind."""

import dataclasses
import json
import shutil

import msgspec
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bundle.errors import CheckpointError, DataError, DeviceUnavailable, EdgewardError, OutputExists, TrainingDiverged
from bundle.log import captured
from bundle.manifest import TextInput
from finetune import evaluate
from finetune.checkpoint import load_checkpoint
from finetune.data import load_dataset
from finetune.loader import EncodedRows
from finetune.strategies import default_epochs
from finetune.train import TrainConfig, prepare, run, train
from tests.finetune_examples import write_bert, write_digits, write_factory, write_tweets


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of digits, a table of tweets, a tiny factory and a tiny BERT."""
    root = tmp_path_factory.mktemp("place")
    write_digits(root / "digits", 400)
    write_tweets(root / "tweets.csv", 300)
    write_factory(root)
    write_bert(root / "bert")
    return root


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def digits_config(place, out, **changes):
    config = TrainConfig(
        model=f"python:{place / 'tiny_models.py'}:tiny", data=str(place / "digits"), out=out, threads=1
    )
    return dataclasses.replace(config, **changes)


def tweets_config(place, out, **changes):
    config = TrainConfig(model=f"transformers:{place / 'bert'}", data=str(place / "tweets.csv"), out=out, max_length=32,
                         threads=1)  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def probed(place, tmp_path_factory):
    """A checkpoint of the digits' probe, and what training said of it."""
    out = tmp_path_factory.mktemp("probed") / "checkpoint"
    return train(digits_config(place, out, cache=False))


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):
    """A checkpoint of the tweets' full training, and what training said of it."""
    out = tmp_path_factory.mktemp("tuned") / "checkpoint"
    return train(tweets_config(place, out, strategy="full", epochs=2))


def validation_logits(checkpoint):
    modality = "text" if isinstance(checkpoint.spec.input, TextInput) else "image"
    dataset = load_dataset(checkpoint.splits.data, modality)
    indices = checkpoint.splits.indices(dataset, "validation")
    rows = EncodedRows(dataset, indices, checkpoint.encode)
    targets = [target.take(indices) for target in dataset.targets]
    return evaluate.logits(checkpoint.network, rows, checkpoint.spec.input), targets


def test_probe_learns_digits(probed):
    """A linear head on even random features reads most digits, and the result says what was done."""
    assert probed.metrics["accuracy"] > 0.85
    assert len(probed.history) == 10
    assert probed.trainable_parameters == 128 * 10 + 10
    assert probed.total_parameters > probed.trainable_parameters
    assert probed.examples == {"train": 280, "validation": 40, "selection": 40, "gate": 40}


def test_full_training_learns_digits(place, tmp_path):
    """Training every weight of a small network from nothing reads most digits after a few epochs."""
    result = train(digits_config(place, tmp_path / "out", strategy="full", epochs=12, learning_rate=0.1))

    assert result.metrics["accuracy"] > 0.8
    assert result.history[0]["train_loss"] > result.history[-1]["train_loss"]
    assert result.trainable_parameters == result.total_parameters
    best = max(result.history, key=lambda epoch: (epoch["accuracy"], -epoch["loss"]))
    assert result.metrics["epoch"] == best["epoch"]


@pytest.mark.parametrize("kind", ["probed", "tuned"])
def test_checkpoint_gives_the_metrics_that_were_reported(kind, request):
    """A checkpoint that is loaded anew has the accuracy, F1 and loss that its training reported."""
    result = request.getfixturevalue(kind)
    checkpoint = load_checkpoint(result.out)
    measured = evaluate.score(checkpoint.spec.tasks, *validation_logits(checkpoint))

    for name in ("accuracy", "macro_f1", "loss"):
        assert measured[name] == pytest.approx(result.metrics[name], rel=1e-5)
        assert checkpoint.spec.provenance.metrics[name] == result.metrics[name]


@pytest.mark.parametrize("kind", ["probed", "tuned"])
def test_loading_is_exact_and_needs_nothing_else(kind, request, place, tmp_path):
    """A checkpoint that was moved gives the same logits bit for bit when its model's folder is gone."""
    source = request.getfixturevalue(kind).out
    expected, _ = validation_logits(load_checkpoint(source))
    shutil.copytree(source, tmp_path / "moved")
    hidden = {
        path: path.rename(path.with_name(f"hidden-{path.name}")) for path in (place / "bert", place / "tiny_models.py")
    }
    try:
        checkpoint = load_checkpoint(tmp_path / "moved")
    finally:
        for path, elsewhere in hidden.items():
            elsewhere.rename(path)

    assert not checkpoint.network.training
    assert {p.dtype for p in checkpoint.network.parameters()} == {torch.float32}
    np.testing.assert_array_equal(validation_logits(checkpoint)[0], expected)


def test_files_are_those_of_the_format(tuned, probed):
    """The directory holds what docs/checkpoint-format.md lists, and nothing that was left beside it."""
    sealed = ["report.html", "run.json", "splits.json", "weights.safetensors"]
    own = ["checkpoint.json", "checkpoint.sha256"]
    assert sorted(p.name for p in tuned.out.iterdir()) == sorted([*own, *sealed, "config.json", "tokenizer.json"])
    assert sorted(p.name for p in probed.out.iterdir()) == sorted([*own, *sealed, "factory.py"])
    assert [p.name for p in tuned.out.parent.iterdir()] == ["checkpoint"]
    spec = json.loads((tuned.out / "checkpoint.json").read_text())
    assert sorted(spec["files"]) == sorted([*sealed, "config.json", "tokenizer.json"])
    assert spec["provenance"]["config"]["strategy"] == "full"


@pytest.mark.parametrize(
    ("examples", "classes", "new", "expected"),
    [
        (100, 2, False, 10), (1_000, 10, False, 10), (1_920, 10, False, 5), (10**6, 10, False, 3),
        (100, 1_000, False, 100), (1_920, 40, False, 10), (10**6, 40, False, 3),
        (100, 2, True, 100), (3_200, 10, True, 20), (3_200, 90, True, 60), (100, 40, True, 200), (10**6, 90, True, 10),
    ],
)  # fmt: skip
def test_default_passes_follow_examples_and_classes(examples, classes, new, expected):
    """Fewer examples are seen more often, within limits, and more classes longer."""
    assert default_epochs(examples, 32, classes, new=new) == expected


def vectors_config(folder, distance, **changes):
    """Dense layers on two clouds of points at that distance; at 0 on whether both numbers of a point have one sign."""
    points = np.random.default_rng(0).normal(size=(200, 2))
    labels = np.arange(200) % 2 if distance else (points.prod(axis=1) > 0).astype(int)
    np.savez(folder / "data.npz", x=(points + distance * labels[:, None]).astype(np.float32), y=labels)
    config = TrainConfig("mlp", str(folder / "data.npz"), out=folder / "auto", strategy="auto", widths=(8,), threads=1)
    return dataclasses.replace(config, split=(0.4, 0.4, 0.1, 0.1), cache=False, **changes)


def test_auto_keeps_what_the_best_strategy_alone_gives(tmp_path):
    """Every rung starts from the first weights, so that the best one is bit-equal to that strategy alone."""
    config = vectors_config(tmp_path, 0, epochs=30, learning_rate=0.05, metric="loss")
    result = train(config)
    alone = train(dataclasses.replace(config, strategy="full", out=tmp_path / "full"))

    assert [rung["strategy"] for rung in result.rungs] == ["probe", "last", "full"]
    probe, last, full = (rung["loss"] for rung in result.rungs)
    assert full < 0.8 * probe
    assert result.rungs[2]["gain"] == pytest.approx(1 - full / min(probe, last))
    assert (result.metrics, result.trainable_parameters) == (alone.metrics, alone.trainable_parameters)
    kept, expected = (load_file(tmp_path / name / "weights.safetensors") for name in ("auto", "full"))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_auto_goes_on_after_a_rung_that_gains_nothing(tmp_path):
    """Without a gain the next rung is tried all the same; the gain is that over the best so far."""
    result = train(vectors_config(tmp_path, 1, epochs=1, learning_rate=1e-12))
    probe, last, full = result.rungs

    assert "gain" not in probe
    assert last["gain"] == last["accuracy"] - probe["accuracy"] < 0  # a head as random as at first
    assert full["gain"] == full["accuracy"] - probe["accuracy"] < 0
    assert (result.metrics["accuracy"], result.trainable_parameters) == (probe["accuracy"], probe["trained"])


def test_auto_stops_where_nothing_is_left_to_gain(tmp_path):
    """What the probe gets all right is trained no further."""
    result = train(vectors_config(tmp_path, 20))

    assert [(rung["strategy"], rung["accuracy"]) for rung in result.rungs] == [("probe", 1.0)]


@pytest.mark.parametrize("strategy", ["probe", "full"])
def test_training_repeats_bit_for_bit(place, tmp_path, strategy):
    """Two runs of one configuration give the same weights, whatever was drawn at random before."""
    weights = []
    for name in ("a", "b"):
        torch.rand(len(weights) + 1)
        train(tweets_config(place, tmp_path / name, strategy=strategy, epochs=1, cache=False))
        weights.append(load_file(tmp_path / name / "weights.safetensors"))

    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_seed_changes_the_result(place, tmp_path, tuned):
    """Another seed gives other splits and another head."""
    train(tweets_config(place, tmp_path / "other", strategy="full", epochs=1, seed=1))

    other, one = load_checkpoint(tmp_path / "other"), load_checkpoint(tuned.out)
    assert other.splits.assignment != one.splits.assignment
    assert not torch.equal(other.network.head.weight, one.network.head.weight)


def test_frozen_means_frozen(probed, place, tmp_path):
    """The probe changes nothing of the backbone, the running means of its normalisation included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the factory's weights are random; training seeds them so
        original = prepare(digits_config(place, tmp_path / "none")).pretrained
    kept = load_checkpoint(probed.out).network.backbone.state_dict()

    assert any("running_mean" in name for name in kept)
    for name, tensor in original.backbone.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_full_training_reaches_every_weight(tuned, place, tmp_path):
    """No tensor of the encoder is as it was."""
    original = prepare(tweets_config(place, tmp_path / "none")).pretrained
    kept = load_checkpoint(tuned.out).network.backbone.state_dict()
    same = [name for name, tensor in original.backbone.named_parameters() if torch.equal(tensor, kept[name])]

    assert same == []


def test_cache_is_used_and_changes_nothing(place, tmp_path):
    """The second run finds the features of the first and fits the same head; other images' features are not taken."""
    weights = []
    for name in ("first", "second"):
        with captured() as logs:
            train(digits_config(place, tmp_path / name))
        weights.append((tmp_path / name / "weights.safetensors").read_bytes())
    assert any(entry["event"] == "features found in the cache" for entry in logs)
    assert weights[0] == weights[1]

    with captured() as logs:
        train(digits_config(place, tmp_path / "third", seed=1))
    assert not any(entry["event"] == "features found in the cache" for entry in logs)


def test_divergence_is_named_and_leaves_nothing(place, tmp_path):
    """A loss that is not finite stops the training with epoch, step and rate, and nothing is written."""
    config = digits_config(place, tmp_path / "new" / "out", strategy="full", learning_rate=1e30, warmup=0.0, epochs=2)

    with pytest.raises(TrainingDiverged, match=r"became (nan|inf) in epoch 1, step \d+, at learning rate .*e\+"):
        train(config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error: No space left")])
def test_failure_while_writing_leaves_nothing(place, tmp_path, monkeypatch, error):
    """A full disk halfway through the weights leaves no checkpoint and nothing beside it."""

    def fail(*args):
        raise error

    monkeypatch.setattr("finetune.checkpoint.save_file", fail)
    with pytest.raises(EdgewardError, match=r"out was not written, and nothing is left of it: .*No space left"):
        train(digits_config(place, tmp_path / "new" / "out"))
    assert list((tmp_path / "new").iterdir()) == []


def test_existing_output_is_left_alone(place, tmp_path):
    """Whatever stands at the destination is refused before anything is loaded."""
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists, match="was left as it is"):
        train(digits_config(place, tmp_path / "out", model="not a model"))


@pytest.mark.parametrize("name", ["temperature", "max_gradient_norm", "learning_rate"])
def test_what_must_be_positive_is_named(place, tmp_path, name):
    """Alone, with its value."""
    with pytest.raises(DataError, match=f"^--{name.replace('_', '-')} is 0; it must be greater than 0"):
        train(digits_config(place, tmp_path / "out", **{name: 0}))


def test_output_that_cannot_be_written_is_refused_first(place, tmp_path):
    """Before anything is loaded, not after the training."""
    (tmp_path / "file").touch()
    with pytest.raises(EdgewardError, match="Choose another --out"):
        train(digits_config(place, tmp_path / "file" / "out", model="not a model"))
    for curves in ("file", "file/curves"):
        with pytest.raises(EdgewardError, match="Choose another --tensorboard"):
            train(digits_config(place, tmp_path / "out", model="not a model", tensorboard=tmp_path / curves))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_missing_cuda_is_an_error_only_when_asked_for(place, tmp_path):
    """cuda without CUDA is refused; auto takes the CPU and says so."""
    with pytest.raises(DeviceUnavailable, match="--device cpu"):
        train(digits_config(place, tmp_path / "out", device="cuda"))
    with captured() as logs:
        train(digits_config(place, tmp_path / "out"))
    assert {"event": "device chosen", "device": "cpu", "level": "info"} in logs


def test_unreadable_example_is_named(place, tmp_path):
    """An image that was removed after it was checked is named with its dataset."""
    write_digits(tmp_path / "digits", 100)
    job = prepare(digits_config(place, tmp_path / "out", data=str(tmp_path / "digits"), cache=False))
    name = job.dataset.names[job.indices("train")[0]]
    (tmp_path / "digits" / name).unlink()
    with pytest.raises(DataError, match=f"{name} of .*digits: .*No such file"):
        run(job)


@pytest.fixture
def copy(tuned, tmp_path):
    return shutil.copytree(tuned.out, tmp_path / "copy")


@pytest.mark.parametrize(
    "name", ["checkpoint.json", "weights.safetensors", "splits.json", "tokenizer.json", "config.json"]
)
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damaged_checkpoint_is_refused(copy, name, damage):
    """Each file that is cut, changed in one byte, or missing is an error."""
    data = (copy / name).read_bytes()
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    (copy / name).unlink()
    if damage != "missing":
        (copy / name).write_bytes(data[:-1] if damage == "cut" else changed)

    with pytest.raises(CheckpointError):
        load_checkpoint(copy)


def reseal(folder, change):
    """Change checkpoint.json as someone would who knows the format."""
    import hashlib

    spec = json.loads((folder / "checkpoint.json").read_text())
    change(spec)
    data = json.dumps(spec).encode()
    (folder / "checkpoint.json").write_bytes(data)
    (folder / "checkpoint.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  checkpoint.json\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(format_version=2), "version 2; this edgeward reads"),
        (lambda spec: spec.update(format="other"), "format 'other'"),
        (lambda spec: spec.update(surprise=1), "unknown field `surprise`"),
        (lambda spec: spec["model"].update(source="jax"), "Invalid value 'jax'"),
        (lambda spec: spec["tasks"][0].update(labels=["a", "b"]), "size mismatch for head"),
        (lambda spec: spec["files"].pop("tokenizer.json"), "lists no file tokenizer.json"),
        (lambda spec: spec.update(tasks=[]), "no task"),
    ],
)
def test_checkpoint_that_is_not_of_the_format_is_refused(copy, change, message):
    """Another version, an unknown key, a head of another width: each is refused with its reason."""
    reseal(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy)


def test_no_checkpoint_is_an_error(tmp_path):
    """A folder without checkpoint.json says that it is none."""
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no checkpoint\.json"):
        load_checkpoint(tmp_path)


def test_what_is_not_listed_is_ignored(copy, tuned):
    """A resume folder or a note does not change a checkpoint, and cannot be read through it."""
    (copy / "resume").mkdir()
    (copy / "resume" / "optimizer.safetensors").write_bytes(b"state")
    checkpoint = load_checkpoint(copy)

    assert checkpoint.sha256 == load_checkpoint(tuned.out).sha256
    assert msgspec.json.decode(checkpoint.read("config.json"))["model_type"] == "bert"
    for name in ("resume/optimizer.safetensors", "../copy/config.json", "checkpoint.json"):
        with pytest.raises(CheckpointError, match="lists no file"):
            checkpoint.read(name)
