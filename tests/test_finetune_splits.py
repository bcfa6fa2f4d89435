"""Which example goes to which split: in proportion, whatever the order, and never to two."""

from collections import Counter

import msgspec
import numpy as np
import pytest
import structlog

from bundle.errors import DataError
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
