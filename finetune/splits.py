"""Which example is trained on, and which is held out: seeded, stratified, by content. docs/checkpoint-format.md."""

import hashlib
from typing import Literal, get_args

import numpy as np

from bundle.errors import DataError
from bundle.manifest import Record
from finetune.data import Dataset

SplitName = Literal["train", "validation", "selection", "gate"]
Fractions = tuple[float, float, float, float]

SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)


class Splits(Record, frozen=True, kw_only=True):
    """The whole of splits.json."""

    data: str  # where the dataset was; absolute
    data_sha256: str  # Dataset.sha256
    input_column: str | None  # of a table; None for a folder
    label_column: str | None
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

    The result is a function of the seed and of the contents with their labels, whatever their order.

    Raises:
        DataError: fractions that are not positive or do not sum to 1, or too few examples for them.
    """
    if len(fractions) != 4 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"split fractions {fractions} must be four positive numbers that sum to 1.")
    contents = _shuffled(dataset, seed)
    assignment = dict(zip(contents, _deal(len(contents), fractions), strict=True))
    _check(dataset, assignment)
    return Splits(
        data=dataset.location,
        data_sha256=dataset.sha256,
        input_column=dataset.input_column,
        label_column=dataset.label_column,
        seed=seed,
        fractions=fractions,
        assignment=assignment,
    )


def _shuffled(dataset: Dataset, seed: int) -> list[str]:
    """Distinct contents, label by label; within a label in an order that the seed decides."""
    label_of: dict[str, int] = {}
    for digest, label in zip(dataset.hashes, dataset.labels.tolist(), strict=True):
        label_of[digest] = min(label, label_of.get(digest, label))
    return sorted(label_of, key=lambda digest: (label_of[digest], hashlib.sha256(f"{seed} {digest}".encode()).digest()))


def _deal(count: int, fractions: Fractions) -> list[SplitName]:
    """To each place in turn the split that is furthest behind its share, so that any run of places is in proportion."""
    shares = [round(fraction * 1_000_000) for fraction in fractions]  # integers: ties do not hang on rounding
    dealt = [0, 0, 0, 0]
    result = []
    for place in range(1, count + 1):
        behind = [share * place - 1_000_000 * n for share, n in zip(shares, dealt, strict=True)]
        split = behind.index(max(behind))
        dealt[split] += 1
        result.append(SPLIT_NAMES[split])
    return result


def _check(dataset: Dataset, assignment: dict[str, SplitName]) -> None:
    empty = [name for name in SPLIT_NAMES if name not in assignment.values()]
    if empty:
        raise DataError(
            f"{dataset.location} has {len(assignment)} different examples, too few for four splits: "
            f"{', '.join(empty)} would be empty."
        )
    splits = [assignment[digest] for digest in dataset.hashes]
    trained = {int(label) for label, split in zip(dataset.labels, splits, strict=True) if split == "train"}
    untrained = [name for i, name in enumerate(dataset.label_names) if i not in trained]
    if untrained:
        raise DataError(
            f"{dataset.location} has too few examples of {len(untrained)} labels, {untrained[0]!r} the first: none of "
            "them is in the train split. Add examples, or give train a larger fraction."
        )
