"""Raw examples -> answers: every row has its own, whatever is wrong with the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from bundle import outputs, preprocess
from bundle.errors import BadInput, EdgewardError, ModelError
from bundle.model import MAX_ROWS, Model, load_model, predict_logits, self_test
from bundle.session import Device
from bundle.store import Bundle, open_bundle
from score import answers, drift
from score.answers import BAD_INPUT, FAILED, OK
from score.config import ScoreConfig
from score.examples import Raw, Raws, Stored
from score.files import open_file

_SLICE = 16  # rows that a thread preprocesses before it takes the next


@dataclass(frozen=True)
class Fault:
    """Why a row has no answer: a status of score.answers, and what is said of it."""

    status: int
    error: str


@dataclass(frozen=True)
class Encoded:
    """Examples, preprocessed.

    Attributes:
        rows: tensors without batch axis, or one array of them all; where there is a fault, nothing of use.
        faults: by the position of the example.
    """

    rows: Sequence[np.ndarray | None] | np.ndarray = ()
    faults: Mapping[int, Fault] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """A table with a row for each example, of which some are bad, and counts of the others, as score.drift has them."""

    table: pa.Table
    bad: int
    drift: drift.Drift


class Scorer:
    """A bundle on a device, answering any number of raw examples. It is to be called from one thread at a time.

    Attributes:
        model: the bundle's variant that is run.
        schema: of what `score` gives.
    """

    def __init__(
        self,
        bundle: Path,
        columns: Callable[..., answers.Columns] = answers.Columns,
        *,
        device: Device = "auto",
        threads: int | None = None,
        batch: int = 64,
        decoders: int = 1,
    ) -> None:
        """Load the bundle, and hold it to its golden examples.

        Args:
            bundle: its directory.
            columns: from tasks to the columns of their answers.
            device: as of load_model.
            threads: of one run on the CPU.
            batch: rows of one run, where answers do not depend on it.
            decoders: threads that preprocess.

        Raises:
            BundleError, DeviceUnavailable, MissingExtra, ModelError: see load_model.
        """
        self.model: Model = load_model(bundle, device=device, threads=threads)
        self._path = bundle
        self._columns = columns(self.model.manifest.tasks)
        self._batch = min(batch, MAX_ROWS)
        self._pool = ThreadPoolExecutor(decoders, "preprocess") if decoders > 1 else None
        self.schema = pa.schema([*self._columns.fields, *answers.STATUS])

    @cached_property
    def _bundle(self) -> Bundle:
        return open_bundle(self._path)  # once: all of it is hashed

    def score(self, raws: Raws) -> pa.Table:
        """A row of answers for each example, in their order; what could not be used or run says why in `_error`."""
        return self.answer(self.encode(raws)).table

    def encode(self, raws: Raws) -> Encoded:
        """Raw examples, preprocessed.

        Raises:
            OSError: a file cannot be read although it is there: another try may succeed.
        """
        if isinstance(raws, np.ndarray):
            finite = np.isfinite(raws)
            spoiled = () if finite.all() else np.flatnonzero(~finite.all(axis=1))
            found = {int(number): self._encode(raws[number].tobytes()) for number in spoiled}
            return Encoded(raws, {number: row for number, row in found.items() if isinstance(row, Fault)})
        rows = list(self._encode_each(raws))
        faults = {number: row for number, row in enumerate(rows) if isinstance(row, Fault)}
        return Encoded([None if isinstance(row, Fault) else row for row in rows], faults)

    def _encode_each(self, raws: Sequence[Raw]) -> Iterator[np.ndarray | Fault]:
        if self._pool is None:
            return map(self._encode, raws)
        slices = [raws[start : start + _SLICE] for start in range(0, len(raws), _SLICE)]
        return chain.from_iterable(self._pool.map(self._encode_all, slices))

    def _encode_all(self, raws: Sequence[Raw]) -> list[np.ndarray | Fault]:
        return [self._encode(raw) for raw in raws]

    def _encode(self, raw: Raw) -> np.ndarray | Fault:
        try:
            if isinstance(raw, BadInput):
                raise raw
            return self.model.encode(_read(raw) if isinstance(raw, Stored) else raw)
        except BadInput as error:
            return Fault(BAD_INPUT, str(error))

    def answer(self, encoded: Encoded) -> Answered:
        """The answers of preprocessed examples.

        Raises:
            BundleError, ModelError: the device fails whatever it is given.
        """
        count, faults = len(encoded.rows), dict(encoded.faults)
        widths = outputs.logits_widths(self.model.manifest.tasks)
        logits = {name: np.zeros((count, width), np.float32) for name, width in widths.items()}
        picked = self._picked(encoded)
        if len(picked):
            self._run(encoded, picked, logits, faults)
        status, errors = _statuses(count, faults)
        answered = status.to_numpy() == OK
        kept = logits if answered.all() else {name: each[answered] for name, each in logits.items()}
        tasks = self.model.manifest.tasks
        found = answers.of_logits(tasks, kept)
        table = pa.Table.from_arrays([*self._columns.arrays(found, answered), status, errors], schema=self.schema)
        return Answered(table, len(faults), drift.of_answers(tasks, found))

    def _picked(self, encoded: Encoded) -> np.ndarray:
        """The examples that can be run, by position; of texts the longest first, so that memory is taken once.

        Then those of a batch have about the same length, and little is padded.
        """
        picked, spec = np.arange(len(encoded.rows)), self.model.manifest.input
        if encoded.faults:
            picked = np.delete(picked, list(encoded.faults))
        if preprocess.is_sequence(spec):
            lengths = [row.shape[-1] for row in encoded.rows if row is not None]
            picked = picked[np.argsort(-np.array(lengths, int), kind="stable")]
        return picked

    def _run(
        self, encoded: Encoded, picked: np.ndarray, logits: dict[str, np.ndarray], faults: dict[int, Fault]
    ) -> None:
        """Run some examples; if they fail, each batch of them for itself, and each half of a batch."""
        try:
            got = self._predict(encoded.rows, picked)
        except ModelError as error:
            if len(picked) == 1:
                self_test(self._bundle, self.model)  # it is the example's fault if others do not fail
                faults[int(picked[0])] = Fault(FAILED, str(error))
                return
            size = self._batch if len(picked) > self._batch else (len(picked) + 1) // 2
            for start in range(0, len(picked), size):
                self._run(encoded, picked[start : start + size], logits, faults)
            return
        for name, values in got.items():
            logits[name][_places(encoded.rows, picked)] = values
            below = values < np.inf  # -inf is the logarithm of 0
            for number in () if below.all() else np.flatnonzero(~below.all(axis=1)):
                faults[int(picked[number])] = Fault(FAILED, f"the model gives {name} that are not numbers.")

    def _predict(self, rows: Sequence[np.ndarray | None] | np.ndarray, picked: np.ndarray) -> dict[str, np.ndarray]:
        places = _places(rows, picked)
        together = rows[places] if isinstance(rows, np.ndarray) else [rows[number] for number in picked.tolist()]
        spec, invariant = self.model.manifest.input, self.model.variant.batch_invariant
        return predict_logits(self.model.session, spec, together, batch_invariant=invariant, most=self._batch)


def _places(rows: Sequence[np.ndarray | None] | np.ndarray, picked: np.ndarray) -> np.ndarray | slice:
    """Where some rows are: a slice, which copies none, of an array of which the rows between are not left out."""
    first, last = int(picked[0]), int(picked[-1])
    whole = isinstance(rows, np.ndarray) and last - first < len(picked)
    return slice(first, last + 1) if whole else picked


def _statuses(count: int, faults: Mapping[int, Fault]) -> tuple[pa.Array, pa.Array]:
    """The columns of answers.STATUS."""
    if not faults:
        return _all_ok(count)
    status, errors = np.full(count, OK, np.int8), np.full(count, None, object)
    for number, fault in faults.items():
        status[number], errors[number] = fault.status, fault.error
    return pa.array(status), pa.array(errors, pa.string())


@lru_cache(maxsize=4)
def _all_ok(count: int) -> tuple[pa.Array, pa.Array]:
    return pa.array(np.full(count, OK, np.int8)), pa.nulls(count, pa.string())


def _read(stored: Stored) -> bytes:
    try:
        with open_file(stored.path) as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise BadInput(f"{stored.path} cannot be read: {error.strerror}.") from error
    except EdgewardError as error:  # a URL that nothing knows how to read
        raise BadInput(f"{stored.path} cannot be read: {error}") from error


def scorer_of(config: ScoreConfig, *, threads: int, batch: int, decoders: int) -> Scorer:
    """The scorer of a run."""
    columns = partial(answers.Columns, top_k=config.top_k, scores=config.scores, logits=config.logits)
    return Scorer(config.bundle, columns, device=config.device, threads=threads, batch=batch, decoders=decoders)
