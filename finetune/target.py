"""What is to be predicted: one label column and its values, some of them perhaps missing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from bundle.manifest import Multiclass, Multilabel, Regression, Task

Kind = Literal["multiclass", "multilabel", "regression"]


@dataclass(frozen=True)
class Target:
    """One label column.

    Attributes:
        name: of the column, and of the task.
        kind: what its values are.
        labels: sorted as strings; none for regression.
        values: multiclass int64 (N,), indices into labels, -1 where missing; multilabel float32 (N, C) of 0 and 1, a
            missing row all NaN; regression float64 (N,), NaN where missing.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """Columns of its logits."""
        return len(self.labels) or 1

    @property
    def known(self) -> np.ndarray:
        """Which examples have a value: bool (N,)."""
        if self.kind == "multiclass":
            return np.asarray(self.values >= 0)
        finite = np.isfinite(self.values)
        return np.asarray(finite if self.kind == "regression" else finite.all(axis=1))

    @property
    def codes(self) -> np.ndarray:
        """A number for each value, in the order of the values: int64 (N,), equal for equal ones, -1 where missing."""
        codes = np.full(len(self), -1, dtype=np.int64)
        known = self.known
        axis = 0 if self.kind == "multilabel" else None
        codes[known] = np.unique(self.values[known], axis=axis, return_inverse=True)[1].ravel()
        return codes

    def take(self, indices: np.ndarray) -> Self:
        """The same column of some examples, int64 positions (M,)."""
        return replace(self, values=self.values[indices])

    def pruned(self, indices: np.ndarray) -> Self:
        """The column of some examples, without the labels that none of them has."""
        taken = self.take(indices)
        if self.kind == "regression":
            return taken
        if self.kind == "multilabel":
            held = np.flatnonzero((taken.values == 1).any(axis=0))
            return replace(taken, labels=tuple(self.labels[i] for i in held), values=taken.values[:, held])
        used = np.unique(taken.values[taken.known])
        renumbered = np.searchsorted(used, taken.values)
        labels = tuple(self.labels[i] for i in used)
        return replace(taken, labels=labels, values=np.where(taken.known, renumbered, -1))

    def task(self, train: np.ndarray) -> Task:
        """The task as manifests describe it; a regression is standardised by its known values at positions `train`."""
        match self.kind:
            case "multiclass":
                return Multiclass(name=self.name, labels=self.labels)
            case "multilabel":
                return Multilabel(name=self.name, labels=self.labels)
            case "regression":
                values = self.values[train]
                values = values[np.isfinite(values)]
                return Regression(name=self.name, mean=float(values.mean()), std=float(values.std()) or 1.0)


def columns(targets: Sequence[Target | Task]) -> list[slice]:
    """Where each task's logits are in a row of all of them."""
    slices, start = [], 0
    for target in targets:
        width = len(getattr(target, "labels", ())) or 1
        slices.append(slice(start, start + width))
        start += width
    return slices
