"""What tells at a glance whether the input is still what the model was trained for, as counts that are added up.

The names of the counts, as they stand in the footers of the parts (`Counts.drift`):

    missing            (rows,)                 a value of the example is not there
    empty              (rows,)                 texts of nothing but white space
    vocabulary         (known, unknown)        tokens, or words of every 16th row
    unknown_texts      (rows,)                 texts with no word that the model knows
    PREFIXlabels       (rows, ...)             by label: predicted
    PREFIXconfidence   (rows, ...)             by twentieths: the score of the likeliest label
    PREFIXvalues       (rows, ...)             by half standard deviations of the training, from -5 to 5

They depend on the rows alone, never on chunks, batches or order.
"""

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from bundle import outputs, preprocess, text
from bundle.manifest import Input, Multiclass, Multilabel, Regression, Task, TextInput, WordsInput
from score.errors import Missing

BINS = 20
SAMPLED = 16  # of so many rows one has its words counted: cutting a text a second time is not free
SPREAD = 5.0  # standard deviations on either side that values are counted in

Drift = dict[str, tuple[int, ...]]


def of_raws(spec: Input, raws: Sequence[object] | np.ndarray) -> Drift:
    """Missing and empty values.

    Args:
        spec: of the examples.
        raws: an example, or the error in its place, of each row; or vectors, of which none is missing.
    """
    if isinstance(raws, np.ndarray):
        return {"missing": (0,)}
    drift: Drift = {"missing": (sum(isinstance(raw, Missing) for raw in raws),)}
    if isinstance(spec, WordsInput) or (isinstance(spec, TextInput) and spec.pair is None):
        drift["empty"] = (sum(isinstance(raw, bytes) and not raw.strip() for raw in raws),)
    return drift


def of_answers(tasks: tuple[Task, ...], answers: Mapping[str, np.ndarray]) -> Drift:
    """Predicted labels, confidence, values.

    Args:
        tasks: of the bundle.
        answers: for the rows that could be scored, from score.answers.of_logits.
    """
    drift: Drift = {}
    for task in tasks:
        name = outputs.prefix(tasks, task)
        match task:
            case Multiclass():
                drift[f"{name}labels"] = _counts(answers[f"{name}best"], len(task.labels))
                drift[f"{name}confidence"] = _histogram(answers[f"{name}confidence"])
            case Multilabel():
                drift[f"{name}labels"] = tuple(answers[f"{name}predicted"].sum(axis=0).tolist())
                drift[f"{name}confidence"] = _histogram(answers[f"{name}confidence"])
            case Regression():  # standardised, as the graph gives them
                values = answers[f"{name}logits"]
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

    def count(
        self, raws: Sequence[object] | np.ndarray, encoded: Sequence[object] | np.ndarray, first_row: int
    ) -> Drift:
        """Known and unknown tokens or words.

        Args:
            raws: of rows that are next to each other in a file.
            encoded: the tensor of each, or anything else where there is none.
            first_row: number of the first.
        """
        match self._spec:
            case TextInput() if self._unknown is not None:
                rows = [np.atleast_2d(row)[0] for row in encoded if isinstance(row, np.ndarray)]
                ids = np.concatenate([*rows, np.zeros(0, np.int64)])
                unknown = int(np.count_nonzero(ids == self._unknown))
                return {"vocabulary": (len(ids) - unknown, unknown)}
            case WordsInput():
                texts = sum(isinstance(row, np.ndarray) and not row.size for row in encoded)
                first = -first_row % SAMPLED
                words = self._words(raws[first::SAMPLED], encoded[first::SAMPLED])
                return {"vocabulary": words, "unknown_texts": (texts,)}
        return {}

    def _words(self, raws: Sequence[object] | np.ndarray, encoded: Sequence[object] | np.ndarray) -> tuple[int, int]:
        assert isinstance(self._spec, WordsInput)
        assert self._segment is not None
        known = unknown = 0
        for raw, row in zip(raws, encoded, strict=True):
            if isinstance(row, np.ndarray) and row.size < self._spec.max_words:  # of one that was cut, not all are seen
                known += row.size
                unknown += len(self._segment(raw.decode())) - row.size if isinstance(raw, bytes) else 0
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
    missing = np.isnan(fractions)
    known = fractions[~missing] if missing.any() else fractions
    return _counts(np.clip(known * BINS, 0, BINS - 1).astype(np.int64), BINS)


def _counts(numbers: np.ndarray, of: int) -> tuple[int, ...]:
    """How often each number below `of` is there."""
    return tuple(np.bincount(numbers, minlength=of).tolist())
