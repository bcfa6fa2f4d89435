"""Which example is trained on, and which is held out: seeded, stratified, by content. docs/checkpoint-format.md."""

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from bundle.errors import DataError
from bundle.log import log
from bundle.manifest import Record
from finetune.data import Dataset
from finetune.target import Target

SplitName = Literal["train", "validation", "selection", "gate"]
Fractions = tuple[float, float, float, float]

SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)

_BINS = 10  # of the values of a regression, equally filled, that each get their share of every split


class Splits(Record, frozen=True, kw_only=True):
    """The whole of splits.json."""

    data: str  # where the dataset was; absolute
    data_sha256: str  # Dataset.sha256
    input_columns: tuple[str, ...]  # of a table or .npz; empty for a folder
    label_columns: tuple[str, ...]  # NAME[:KIND[:WEIGHT]]
    seed: int
    fractions: Fractions  # of train, validation, selection, gate
    assignment: dict[str, SplitName]  # by hex sha256 of the raw example

    def indices(self, dataset: Dataset, split: SplitName) -> np.ndarray:
        """Positions int64 (N,), ascending, of a split's examples in the dataset.

        Equal contents are in one split; of the two that are held out for export, selection and gate, only the first
        of equal contents is given, so that their examples are distinct.

        Raises:
            DataError: the dataset is not the one that was split.
        """
        if dataset.sha256 != self.data_sha256:
            raise DataError(
                f"{dataset.location} is not the data that was split: its sha256 is {dataset.sha256}, not "
                f"{self.data_sha256} (of {self.data}). Give the same examples and labels."
            )
        positions = [i for i, digest in enumerate(dataset.hashes) if self.assignment[digest] == split]
        if split in ("selection", "gate"):
            first = {dataset.hashes[i]: i for i in reversed(positions)}
            positions = sorted(first.values())
        return np.array(positions, dtype=np.int64)


def make_splits(dataset: Dataset, fractions: Fractions = (0.7, 0.1, 0.1, 0.1), *, seed: int) -> Splits:
    """Deal the distinct contents of each label to the four splits in proportion.

    The labels are those of the first multiclass task; without one, the first task's sets of labels, or the bins of its
    values. Of a dataset that keeps examples for testing, these are dealt to selection and gate, the others to train
    and validation. The result is a function of the seed and of the contents with their labels, whatever their order.

    Raises:
        DataError: fractions that are not positive or do not sum to 1, or too few examples for them.
    """
    if len(fractions) != 4 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"split fractions {fractions} must be four positive numbers that sum to 1.")
    assignment = deal(dataset, fractions, seed=seed)
    _check(dataset, assignment)
    return Splits(
        data=dataset.location,
        data_sha256=dataset.sha256,
        input_columns=dataset.input_columns,
        label_columns=dataset.label_columns,
        seed=seed,
        fractions=fractions,
        assignment=assignment,
    )


def deal(dataset: Dataset, fractions: Fractions, *, seed: int) -> dict[str, SplitName]:
    """The split of each distinct content, as make_splits deals them; a fraction may be 0, a split come out empty."""
    shares = [round(fraction * 1_000_000) for fraction in fractions]  # integers: ties do not hang on rounding
    contents = _shuffled(dataset, seed)
    if len(contents) < len(dataset):
        log.warning("equal examples are in one split", data=dataset.location, surplus=len(dataset) - len(contents))
    held_out = _held_out(dataset)
    if not held_out:
        return _deal(contents, shares)
    rest = [content for content in contents if content not in held_out]
    assignment = _deal(rest, [*shares[:2], 0, 0])
    return assignment | _deal([content for content in contents if content in held_out], [0, 0, *shares[2:]])


def _shuffled(dataset: Dataset, seed: int) -> list[str]:
    """Distinct contents, stratum by stratum; within a stratum in an order that the seed decides."""
    stratum_of: dict[str, int] = {}
    for digest, stratum in zip(dataset.hashes, _strata(dataset.targets, seed).tolist(), strict=True):
        stratum_of[digest] = min(stratum, stratum_of.get(digest, stratum))
    return sorted(stratum_of, key=lambda digest: (stratum_of[digest], _random(seed, digest)))


def _strata(targets: Sequence[Target], seed: int) -> np.ndarray:
    """For each example what it shares with those that are dealt in proportion: int64 (N,), the missing ones last."""
    target = next((target for target in targets if target.kind == "multiclass"), targets[0])
    strata, known = target.codes, target.known
    if target.kind == "regression":
        values = target.values[known]
        edges = np.quantile(values, np.arange(1, _BINS) / _BINS, method="inverted_cdf")
        strata[known] = np.searchsorted(edges, values, side="right")
    elif target.kind == "multilabel":  # in no order: neighbours would share labels, and come by turns to the same split
        order = sorted(range(strata.max() + 1), key=lambda code: _random(seed, str(code)))
        strata[known] = np.argsort(order)[strata[known]]
    strata[~known] = strata.max() + 1
    return strata


def _random(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {text}".encode()).digest()


def _held_out(dataset: Dataset) -> set[str]:
    """Contents that the dataset keeps for testing, and warn about those that it also trains on."""
    if dataset.held_out is None:
        return set()
    flagged = list(zip(dataset.hashes, dataset.held_out.tolist(), strict=True))
    test = {digest for digest, held_out in flagged if held_out}
    leaked = sum(digest in test for digest, held_out in flagged if not held_out)
    if leaked:
        log.warning("examples to train on are also in the test part, and held out", data=dataset.location, count=leaked)
    return test


def _deal(contents: Sequence[str], shares: Sequence[int]) -> dict[str, SplitName]:
    """To each place in turn the split that is furthest behind its share, so that any run of places is in proportion."""
    total = sum(shares)
    dealt = [0, 0, 0, 0]
    assignment = {}
    for place, content in enumerate(contents, start=1):
        behind = [share * place - total * n for share, n in zip(shares, dealt, strict=True)]
        split = behind.index(max(behind))
        dealt[split] += 1
        assignment[content] = SPLIT_NAMES[split]
    return assignment


def _check(dataset: Dataset, assignment: dict[str, SplitName]) -> None:
    used = set(assignment.values())
    empty = [name for name in SPLIT_NAMES if name not in used]
    if empty:
        raise DataError(
            f"{dataset.location} has {len(assignment)} different examples, too few for four splits: "
            f"{', '.join(empty)} would be empty."
        )
    splits = np.array([SPLIT_NAMES.index(assignment[digest]) for digest in dataset.hashes])
    for target in dataset.targets:
        where = dataset.location if len(dataset.targets) == 1 else f"column {target.name!r} of {dataset.location}"
        _check_target(target, splits, where)


def _check_target(target: Target, splits: np.ndarray, where: str) -> None:
    """That there is something to learn in train, positions 0 in splits, and something to measure in the others."""
    unknown = [name for i, name in enumerate(SPLIT_NAMES) if not (target.known & (splits == i)).any()]
    if unknown:
        raise DataError(
            f"{where} has too few known values, {target.known.sum()}: none of them is in {' and '.join(unknown)}. "
            "Label more examples, or leave the column out."
        )
    train = target.take(np.flatnonzero((splits == 0) & target.known)).values
    if target.kind == "regression":
        if train.min() == train.max():
            raise DataError(
                f"{where} has {len(train)} known values in the train split, all of them {train[0]}. Add others."
            )
        return
    present = np.isin(np.arange(target.width), train) if target.kind == "multiclass" else (train == 1).any(axis=0)
    untrained = [label for label, is_present in zip(target.labels, present, strict=True) if not is_present]
    if untrained:
        raise DataError(
            f"{where} has too few examples of {len(untrained)} labels, {untrained[0]!r} the first: none of "
            "them is in the train split. Add examples, or give train a larger fraction."
        )
