"""What a reader of data found, before anything is left out or judged."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from finetune.target import Target


@dataclass(frozen=True)
class Source:
    """N examples in the order in which they were found.

    Attributes:
        location: absolute path, or the name of a dataset.
        names: what to call each example in a message.
        digests: hex sha256 of each example's content; "" where it cannot be read.
        raw: an example as bytes.
        targets: what is to be predicted, with N values each.
        bad: position -> what is wrong with the example.
        lost: what is wrong with each row that could not even be told apart, in addition to the N.
        input_columns: of a table; empty for a folder.
        label_columns: of a table, as they were given; empty for a folder.
        weights: of each task's loss.
        held_out: bool (N,), which examples the dataset itself keeps for testing; None if it does not say.
        feature_names: what each number of a vector is, when they are columns of a table.
    """

    location: str
    names: Sequence[str]
    digests: Sequence[str]
    raw: Callable[[int], bytes]
    targets: tuple[Target, ...]
    bad: dict[int, str] = field(default_factory=dict)
    lost: Sequence[str] = ()
    input_columns: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()
    weights: tuple[float, ...] = (1.0,)
    held_out: np.ndarray | None = None
    feature_names: tuple[str, ...] = ()


def vector_content(vectors: np.ndarray) -> tuple[list[str], Callable[[int], bytes]]:
    """Digests and raw bytes of the rows of float32 (N, D): little-endian, one number after the other."""
    little = np.ascontiguousarray(vectors, dtype="<f4")
    return [hashlib.sha256(row).hexdigest() for row in little], lambda index: little[index].tobytes()
