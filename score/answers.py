"""Logits -> the columns that are written. Their names are those of docs/protocol.md."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bundle import outputs
from bundle.manifest import Multiclass, Multilabel, Regression, Task

OK, BAD_INPUT, FAILED = 0, 1, 2  # of the column _status
STATUS = [pa.field("_status", pa.int8()), pa.field("_error", pa.string())]


def of_logits(tasks: tuple[Task, ...], logits: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything that is said of some rows, each computed once.

    Args:
        tasks: of the bundle.
        logits: the graph's outputs, float32 (N, width of the task).

    Returns:
        What bundle.outputs.answers gives, the logits themselves, of labels as PREFIXconfidence the score of the
        likeliest, float32 (N,), and of one out of several as PREFIXbest its position, int64 (N,).
    """
    found = {**logits, **outputs.answers(tasks, logits)}
    for task in tasks:
        name = outputs.prefix(tasks, task)
        match task:
            case Multiclass():
                best = logits[f"{name}logits"].argmax(axis=1)
                found[f"{name}best"] = best
                found[f"{name}confidence"] = found[f"{name}score"][np.arange(len(best)), best]
            case Multilabel():
                found[f"{name}confidence"] = found[f"{name}score"].max(axis=1)
    return found


@dataclass(frozen=True)
class Columns:
    """Which columns the answers of some tasks have.

    Attributes:
        tasks: of the bundle.
        top_k: this many of the highest labels; 0 for none.
        scores: of all labels.
        logits: of classification tasks.
    """

    tasks: tuple[Task, ...]
    top_k: int = 0
    scores: bool = False
    logits: bool = False

    @property
    def fields(self) -> list[pa.Field]:
        """Names and types."""
        none = {name: np.zeros((0, width), np.float32) for name, width in outputs.logits_widths(self.tasks).items()}
        return [pa.field(name, array.type) for name, array in self._columns(of_logits(self.tasks, none))]

    def arrays(self, answers: Mapping[str, np.ndarray], answered: np.ndarray) -> list[pa.Array]:
        """The columns, null where a row was not answered.

        Args:
            answers: of the M rows that were, from of_logits.
            answered: which of the N rows they are, bool (N,), M of them true.
        """
        found = [array for _, array in self._columns(answers)]
        if answered.all():
            return found
        places = pa.array(np.cumsum(answered) - 1, mask=~answered)
        return [array.take(places) for array in found]

    def _columns(self, answers: Mapping[str, np.ndarray]) -> Iterator[tuple[str, pa.Array]]:
        for task in self.tasks:
            name = outputs.prefix(self.tasks, task)
            if isinstance(task, Regression):
                yield f"{name}value", pa.array(answers[f"{name}value"][:, 0])
                continue
            yield from self._classification(task, name, answers)

    def _classification(
        self, task: Multiclass | Multilabel, name: str, answers: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, pa.Array]]:
        labels, scores, logits = pa.array(task.labels, pa.string()), answers[f"{name}score"], answers[f"{name}logits"]
        if isinstance(task, Multiclass):
            yield f"{name}label", labels.take(pa.array(answers[f"{name}best"]))
            yield f"{name}score", pa.array(answers[f"{name}confidence"])
        else:
            predicted = answers[f"{name}predicted"]
            chosen = labels.take(pa.array(np.nonzero(predicted)[1]))
            yield f"{name}predicted", _lists(chosen, np.concatenate([[0], predicted.sum(axis=1).cumsum()]))
        if self.top_k:
            highest = np.argsort(-logits, axis=1, kind="stable")[:, : self.top_k]
            yield f"{name}top_labels", _rows(labels.take(pa.array(highest.reshape(-1))), highest.shape)
            yield (
                f"{name}top_scores",
                _rows(pa.array(np.take_along_axis(scores, highest, 1).reshape(-1)), highest.shape),
            )
        if self.scores:
            yield f"{name}scores", _rows(pa.array(scores.reshape(-1)), scores.shape)
        if self.logits:
            yield f"{name}logits", _rows(pa.array(logits.reshape(-1)), logits.shape)


def _rows(values: pa.Array, shape: tuple[int, ...]) -> pa.Array:
    return _lists(values, np.arange(shape[0] + 1) * shape[1])


def _lists(values: pa.Array, offsets: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
