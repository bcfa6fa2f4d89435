"""Which example goes to which split: in proportion, whatever the order, and never to two."""

from collections import Counter

import msgspec
import numpy as np
import pytest

from bundle.errors import DataError
from bundle.log import captured
from finetune.data import load_dataset
from finetune.splits import SPLIT_NAMES, Splits, make_splits
from tests.finetune_examples import tweets, write_cifar, write_csv, write_tweets

HEADER = ["text", "label"]
FRACTIONS = (0.7, 0.1, 0.1, 0.1)


@pytest.fixture(scope="module")
def some_tweets(tmp_path_factory):
    return load_dataset(write_tweets(tmp_path_factory.mktemp("data") / "tweets.csv", 1000), "text")


def test_splits_part_the_data(some_tweets):
    """Every example is in exactly one split, and the splits have their shares."""
    splits = make_splits(some_tweets, (0.7, 0.1, 0.1, 0.1), seed=0)
    parts = [splits.indices(some_tweets, name) for name in SPLIT_NAMES]

    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert [len(part) for part in parts] == [700, 100, 100, 100]


@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.1, 0.1), (0.4, 0.2, 0.2, 0.2), (0.25, 0.25, 0.25, 0.25)])
def test_splits_are_stratified(some_tweets, fractions):
    """Each label has its share of each split, give or take two examples."""
    splits = make_splits(some_tweets, fractions, seed=1)
    of_label = Counter(some_tweets.targets[0].values.tolist())
    for name, fraction in zip(SPLIT_NAMES, fractions, strict=True):
        counts = Counter(some_tweets.targets[0].values[splits.indices(some_tweets, name)].tolist())
        for label, count in of_label.items():
            assert abs(counts[label] - fraction * count) <= 2


def test_splits_are_a_function_of_seed_and_content(tmp_path, some_tweets):
    """The order of the rows changes nothing, the seed changes everything."""
    rows = [list(row) for row in tweets(1000)]
    shuffled = load_dataset(write_csv(tmp_path / "b.csv", [HEADER, *rows[::-1]]), "text")

    first = make_splits(some_tweets, seed=0).assignment
    assert make_splits(shuffled, seed=0).assignment == first
    other = make_splits(some_tweets, seed=1).assignment
    assert sum(other[digest] != split for digest, split in first.items()) > 300


def test_equal_examples_are_held_out_together_and_once(tmp_path):
    """Duplicates never cross splits; selection and gate have each content once, train keeps them all."""
    rows = [row for row in tweets(100) for _ in range(3)]
    dataset = load_dataset(write_csv(tmp_path / "a.csv", [HEADER, *rows]), "text")
    splits = make_splits(dataset, seed=0)
    contents = {name: [dataset.hashes[i] for i in splits.indices(dataset, name)] for name in SPLIT_NAMES}

    assert sum(len(set(c)) for c in contents.values()) == 100
    assert len(set().union(*contents.values())) == 100
    assert len(contents["train"]) == 3 * len(set(contents["train"]))
    for name in ("selection", "gate"):
        assert len(contents[name]) == len(set(contents[name]))


def test_other_data_is_refused(some_tweets, tmp_path):
    """Splits only speak about the data that was split."""
    splits = make_splits(some_tweets, seed=0)
    other = load_dataset(write_csv(tmp_path / "a.csv", [HEADER, *tweets(999)]), "text")

    with pytest.raises(DataError, match="not the data that was split"):
        splits.indices(other, "gate")


@pytest.mark.parametrize(
    ("rows", "fractions", "message"),
    [
        (20, (0.5, 0.5, 0.0, 0.0), "four positive numbers"),
        (20, (0.7, 0.1, 0.1, 0.2), "four positive numbers"),
        (4, (0.7, 0.1, 0.1, 0.1), "4 different examples, too few"),
        (40, (0.04, 0.32, 0.32, 0.32), "none of them is in the train split"),
    ],
)
def test_impossible_splits_are_refused(tmp_path, rows, fractions, message):
    """Wrong fractions, an empty split, and a label that nothing is learned about are errors."""
    table = [HEADER, *([f"text {i}", f"label {i // 2}"] for i in range(rows))]
    with pytest.raises(DataError, match=message):
        make_splits(load_dataset(write_csv(tmp_path / "a.csv", table), "text"), fractions, seed=0)


def test_splits_survive_json(some_tweets):
    """What is written is what is read."""
    splits = make_splits(some_tweets, seed=3)
    assert msgspec.json.decode(msgspec.json.encode(splits), type=Splits) == splits


def numbers(folder, count, seed=0):
    """A table of feature vectors whose label y is a number of a skewed distribution."""
    random = np.random.default_rng(seed)
    rows = [[i, round(value, 3)] for i, value in enumerate(random.lognormal(size=count))]
    return load_dataset(write_csv(folder / "y.csv", [["f", "y"], *rows]), "vector", label_column=("y:regression",))


def test_numbers_are_stratified_by_their_bins(tmp_path):
    """Each tenth of a regression's values has its share of each split, give or take two examples."""
    dataset = numbers(tmp_path, 1000)
    values = dataset.targets[0].values
    bins = np.searchsorted(np.quantile(values, np.arange(1, 10) / 10, method="inverted_cdf"), values, side="right")
    splits = make_splits(dataset, FRACTIONS, seed=0)
    for name, fraction in zip(SPLIT_NAMES, FRACTIONS, strict=True):
        counts = np.bincount(bins[splits.indices(dataset, name)], minlength=10)
        assert np.abs(counts - fraction * np.bincount(bins, minlength=10)).max() <= 2


def test_sets_of_labels_are_stratified(tmp_path):
    """Each set of labels has its share of each split, and sets that differ in one label do not take turns."""
    for bits in (4, 10):  # sets that are common, and sets that occur once
        labels = ["|".join("abcdefghij"[bit] for bit in range(bits) if i >> bit & 1) or "|" for i in range(1 << 10)]
        rows = [[f"text {i}", label] for i, label in enumerate(labels)]
        path = write_csv(tmp_path / "a.csv", [HEADER, *rows])
        dataset = load_dataset(path, "text", label_column=("label:multilabel",))
        splits = make_splits(dataset, FRACTIONS, seed=0)
        for name in SPLIT_NAMES:
            held = dataset.targets[0].values[splits.indices(dataset, name)].mean(axis=0)
            np.testing.assert_allclose(held, 0.5, atol=0.02 if bits == 4 else 0.15)


def test_several_tasks_are_stratified_by_the_first_of_labels(tmp_path):
    """A multiclass task decides, wherever it stands among the columns; those without its label have their share too."""
    rows = [[f"text {i}", i / 7, ["", "x", "y"][i % 3]] for i in range(300)]
    path = write_csv(tmp_path / "a.csv", [["text", "price", "topic"], *rows])
    dataset = load_dataset(path, "text", label_column=("price:regression", "topic"))
    splits = make_splits(dataset, FRACTIONS, seed=0)
    for name, share in zip(SPLIT_NAMES, [70, 10, 10, 10], strict=True):
        counts = Counter(dataset.targets[1].values[splits.indices(dataset, name)].tolist())
        assert counts == {-1: share, 0: share, 1: share}


@pytest.mark.parametrize("column", ["y:regression", "tags:multilabel"])
def test_splits_of_every_kind_are_a_function_of_seed_and_content(tmp_path, column):
    """The order of the rows changes nothing, whatever they are stratified by, and duplicates are no exception."""
    rows = [[f"text {i % 150}", i % 37, ["a", "a|b", "b|c", "|"][i % 4]] for i in range(200)]
    header = ["text", "y", "tags"]
    one, other = (
        load_dataset(write_csv(tmp_path / name, [header, *some]), "text", label_column=(column,))
        for name, some in [("a.csv", rows), ("b.csv", rows[::-1])]
    )

    assert one.sha256 == other.sha256
    assert make_splits(one, seed=0).assignment == make_splits(other, seed=0).assignment
    assert make_splits(one, seed=0).assignment != make_splits(one, seed=1).assignment


def test_held_out_examples_are_for_selection_and_gate(tmp_path):
    """What a dataset keeps for testing is never trained on, and is dealt in proportion, as is the rest."""
    dataset = load_dataset(write_cifar(tmp_path, train=800, test=200), "image")
    splits = make_splits(dataset, (0.6, 0.2, 0.05, 0.15), seed=0)
    parts = {name: splits.indices(dataset, name) for name in SPLIT_NAMES}

    assert {name: len(part) for name, part in parts.items()} == {
        "train": 600,
        "validation": 200,
        "selection": 50,
        "gate": 150,
    }
    for name, part in parts.items():
        assert set(dataset.held_out[part].tolist()) == {name in ("selection", "gate")}


def test_example_of_both_parts_is_held_out_and_counted(tmp_path):
    """Equal images in the training and the test part are not trained on, and a warning counts them."""
    write_cifar(tmp_path, train=800, test=200)
    first = (tmp_path / "data_batch_1.bin").read_bytes()
    leaked = (tmp_path / "test_batch.bin").read_bytes()[: 3 * 3073]
    (tmp_path / "data_batch_1.bin").write_bytes(first + leaked)
    dataset = load_dataset(tmp_path, "image")
    with captured() as logs:
        splits = make_splits(dataset, seed=0)

    assert [entry.get("count") for entry in logs if "test part" in entry["event"]] == [3]
    assert [entry.get("surplus") for entry in logs if "one split" in entry["event"]] == [3]
    trained = {dataset.hashes[i] for i in splits.indices(dataset, "train")}
    assert not trained & {dataset.hashes[i] for i in np.flatnonzero(dataset.held_out)}


def test_duplicates_are_counted(tmp_path):
    """How many rows have the content of another is said, and nothing when there are none."""
    for rows, surplus in [(tweets(60) * 2, [60]), (tweets(60), [])]:
        dataset = load_dataset(write_csv(tmp_path / "a.csv", [HEADER, *rows]), "text")
        with captured() as logs:
            make_splits(dataset, seed=0)
        assert [entry["surplus"] for entry in logs] == surplus


@pytest.mark.parametrize(
    ("other", "column", "message"),
    [
        (["1", "2", *[""] * 38], "other:regression", "column 'other' of .* has too few known values, 2: none of them"),
        ([*["x"] * 38, "y|x", "y"], "other:multilabel", "too few examples of 1 labels, 'y' the first: none"),
        ([*["1"] * 38, "2", "2"], "other:regression", "has 16 known values in the train split, all of them 1.0"),
    ],
)
def test_every_task_needs_examples_in_every_split(tmp_path, other, column, message):
    """A task with values in some splits only, a label or a spread of values that training would never see."""
    rows = [[f"text {i}", f"label {i % 2}", cell] for i, cell in enumerate(other)]
    path = write_csv(tmp_path / "a.csv", [[*HEADER, "other"], *rows])
    dataset = load_dataset(path, "text", label_column=("label", column))
    with pytest.raises(DataError, match=message):
        make_splits(dataset, (0.4, 0.2, 0.2, 0.2), seed=1)
