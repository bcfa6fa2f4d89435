"""What tells at a glance whether the input is still what the model was trained for, as counts that are added up.

The names of the counts, as they stand in the footers of the parts (`Counts.drift`):

    nulls:COLUMN       (rows,)
    empty:COLUMN       (rows,)                 texts of nothing but white space, and binary of no bytes
    vocabulary         (known, unknown)        tokens, or words of every 16th row
    unknown_texts      (rows,)                 texts with no word that the model knows
    PREFIXlabels       (rows, ...)             by label: predicted
    PREFIXconfidence   (rows, ...)             by twentieths: the score of the likeliest label
    PREFIXvalues       (rows, ...)             by half standard deviations of the training, from -5 to 5

They depend on the rows alone, never on chunks, batches or order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bundle import outputs, preprocess, text
from bundle.manifest import Input, Multiclass, Multilabel, Regression, Task, TextInput, WordsInput

BINS = 20
SAMPLED = 16  # of so many rows one has its words counted: cutting a text a second time is not free
SPREAD = 5.0  # standard deviations on either side that values are counted in

Drift = dict[str, tuple[int, ...]]


def of_inputs(table: pa.Table, columns: Iterable[str]) -> Drift:
    """Missing and empty values.

    Args:
        table: raw rows.
        columns: those of the model.
    """
    drift: Drift = {}
    for name in columns:
        column = table.column(name)
        drift[f"nulls:{name}"] = (column.null_count,)
        if _is_text(column.type) or _is_binary(column.type):
            bare = pc.ascii_trim_whitespace(column) if _is_text(column.type) else column
            drift[f"empty:{name}"] = (pc.sum(pc.equal(pc.binary_length(bare), 0)).as_py() or 0,)
    return drift


def of_logits(tasks: tuple[Task, ...], logits: Mapping[str, np.ndarray]) -> Drift:
    """Predicted labels, confidence, values.

    Args:
        tasks: of the bundle.
        logits: the graph's outputs for rows that could be scored, float32 (N, columns of the task).
    """
    drift: Drift = {}
    for task in tasks:
        name = outputs.prefix(tasks, task)
        values = logits[f"{name}logits"]
        match task:
            case Multiclass():
                drift[f"{name}labels"] = _counts(values.argmax(axis=1), len(task.labels))
                drift[f"{name}confidence"] = _histogram(outputs.softmax(values).max(axis=1))
            case Multilabel():
                score = outputs.sigmoid(values)
                drift[f"{name}labels"] = tuple((score >= np.float32(task.threshold)).sum(axis=0).tolist())
                drift[f"{name}confidence"] = _histogram(score.max(axis=1))
            case Regression():  # standardised, as the graph gives them
                drift[f"{name}values"] = _histogram((values[:, 0] + SPREAD) / (2 * SPREAD))
    return drift


class Vocabulary:
    """How much of the texts the model does not know; of other inputs it counts nothing."""

    def __init__(self, spec: Input, read: Callable[[str], bytes]) -> None:
        """Prepare to count.

        Args:
            spec: of the bundle.
            read: gives the bytes of a file of the bundle.
        """
        self._spec = spec
        self._unknown: int | None = None
        self._segment: Callable[[str], list[str]] | None = None
        match spec:
            case TextInput():
                self._unknown = _unknown_token(read(text.TOKENIZER))
            case WordsInput():
                self._segment = preprocess.words_encoder(spec, read).segment

    def count(self, raws: Sequence[bytes], tensors: Sequence[np.ndarray], numbers: Sequence[int]) -> Drift:
        """Known and unknown tokens or words.

        Args:
            raws: examples that could be preprocessed.
            tensors: of bundle.preprocess.encoder, one for each.
            numbers: of the rows in their file.
        """
        match self._spec:
            case TextInput() if self._unknown is not None and tensors:
                ids = np.concatenate([np.atleast_2d(tensor)[0] for tensor in tensors])
                unknown = int(np.count_nonzero(ids == self._unknown))
                return {"vocabulary": (len(ids) - unknown, unknown)}
            case WordsInput():
                drift = {"vocabulary": self._words(raws, tensors, numbers)}
                return drift | {"unknown_texts": (sum(not tensor.size for tensor in tensors),)}
        return {}

    def _words(self, raws: Sequence[bytes], tensors: Sequence[np.ndarray], numbers: Sequence[int]) -> tuple[int, int]:
        assert isinstance(self._spec, WordsInput)
        assert self._segment is not None
        known = unknown = 0
        for raw, tensor, number in zip(raws, tensors, numbers, strict=True):
            if number % SAMPLED or tensor.size == self._spec.max_words:  # of a text that was cut, nobody counted all
                continue
            known += tensor.size
            unknown += len(self._segment(raw.decode())) - tensor.size
        return known, unknown


def _unknown_token(tokenizer: bytes) -> int | None:
    """The id that stands for what the tokenizer does not know; None where it knows every byte."""
    model = msgspec.json.decode(tokenizer)["model"]
    vocabulary, name = model.get("vocab"), model.get("unk_token")
    if isinstance(vocabulary, dict) and name in vocabulary:
        return int(vocabulary[name])
    number = model.get("unk_id")  # of Unigram
    return None if number is None else int(number)


def _histogram(fractions: np.ndarray) -> tuple[int, ...]:
    """Counts by BINS equal parts of [0, 1]; what lies outside is in the outermost, what is not a number in none."""
    finite = fractions[~np.isnan(fractions)]
    return _counts(np.clip(np.floor(finite * BINS), 0, BINS - 1).astype(np.int64), BINS)


def _counts(numbers: np.ndarray, of: int) -> tuple[int, ...]:
    """How often each number below `of` is there."""
    return tuple(np.bincount(numbers, minlength=of).tolist())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
