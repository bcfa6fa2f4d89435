"""Raw examples -> answers: every row has its own, whatever is wrong with the others."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from bundle import outputs, preprocess
from bundle.errors import BadInput, EdgewardError, ModelError
from bundle.model import Model, load_model, predict_logits, self_test
from bundle.session import Device
from bundle.store import open_bundle
from score import answers, drift
from score.answers import BAD_INPUT, FAILED, OK
from score.config import ScoreConfig
from score.examples import Raw, Stored
from score.files import open_file

_SLICE = 16  # rows that a thread preprocesses before it takes the next


@dataclass(frozen=True)
class Fault:
    """Why a row has no answer: a status of score.answers, and what is said of it."""

    status: int
    error: str


Encoded = list[np.ndarray | Fault]


@dataclass(frozen=True)
class Answered:
    """A table with a row for each example, and counts of what was answered, as score.drift defines them."""

    table: pa.Table
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
        self._bundle = bundle
        self._columns = columns(self.model.manifest.tasks)
        self._batch = batch
        self._pool = ThreadPoolExecutor(decoders, "preprocess") if decoders > 1 else None
        self.schema = pa.schema([*self._columns.fields, *answers.STATUS])

    def score(self, raws: Sequence[Raw]) -> pa.Table:
        """A row of answers for each example, in their order; what could not be used or run says why in `_error`."""
        return self.answer(self.encode(raws)).table

    def encode(self, raws: Sequence[Raw]) -> Encoded:
        """Raw examples, preprocessed.

        Raises:
            OSError: a file cannot be read although it is there: another try may succeed.
        """
        if self._pool is None:
            return self._encode_all(raws)
        slices = [raws[start : start + _SLICE] for start in range(0, len(raws), _SLICE)]
        return list(chain.from_iterable(self._pool.map(self._encode_all, slices)))

    def _encode_all(self, raws: Sequence[Raw]) -> Encoded:
        return [self._encode(raw) for raw in raws]

    def _encode(self, raw: Raw) -> np.ndarray | Fault:
        try:
            if isinstance(raw, BadInput):
                raise raw
            return self.model.encode(_read(raw) if isinstance(raw, Stored) else raw)
        except BadInput as error:
            return Fault(BAD_INPUT, str(error))

    def answer(self, rows: Encoded) -> Answered:
        """The answers of preprocessed examples.

        Raises:
            BundleError, ModelError: the device fails whatever it is given.
        """
        faults = [row if isinstance(row, Fault) else None for row in rows]
        usable = [number for number, row in enumerate(rows) if not isinstance(row, Fault)]
        widths = outputs.logits_widths(self.model.manifest.tasks)
        logits = {name: np.zeros((len(rows), width), np.float32) for name, width in widths.items()}
        for picked in self._batches(rows, usable):
            self._run(rows, picked, logits, faults)
        answered = np.array([fault is None for fault in faults], bool)
        status = pa.array([OK if fault is None else fault.status for fault in faults], pa.int8())
        errors = pa.array([None if fault is None else fault.error for fault in faults], pa.string())
        kept = logits if answered.all() else {name: each[answered] for name, each in logits.items()}
        columns = [*self._columns.arrays(kept, answered), status, errors]
        table = pa.Table.from_arrays(columns, schema=self.schema)
        return Answered(table, drift.of_logits(self.model.manifest.tasks, kept))

    def _batches(self, rows: Encoded, usable: list[int]) -> list[list[int]]:
        """Examples of about the same length, so that little is padded; the longest first, so that memory is taken once.

        Where answers depend on the batch, predict_logits runs one at a time.
        """
        spec = self.model.manifest.input
        ordered = sorted(usable, key=lambda number: -preprocess.length(rows[number], spec))  # type: ignore[arg-type]
        return [ordered[start : start + self._batch] for start in range(0, len(ordered), self._batch)]

    def _run(self, rows: Encoded, picked: list[int], logits: dict[str, np.ndarray], faults: list[Fault | None]) -> None:
        """Run some examples; if they fail, each half of them for itself."""
        try:
            got = self._predict([rows[number] for number in picked])
        except ModelError as error:
            if len(picked) == 1:
                self_test(open_bundle(self._bundle), self.model)  # it is the example's fault if others do not fail
                faults[picked[0]] = Fault(FAILED, str(error))
                return
            for half in (picked[: len(picked) // 2], picked[len(picked) // 2 :]):
                self._run(rows, half, logits, faults)
            return
        for name, values in got.items():
            logits[name][picked] = values

    def _predict(self, batch: Sequence[np.ndarray | Fault]) -> dict[str, np.ndarray]:
        tensors = [row for row in batch if isinstance(row, np.ndarray)]
        manifest, variant = self.model.manifest, self.model.variant
        return predict_logits(self.model.session, manifest.input, tensors, batch_invariant=variant.batch_invariant)


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
