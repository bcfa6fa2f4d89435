"""Units -> parts: reading, preprocessing, running and writing side by side."""

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from bundle.errors import DataError
from bundle.manifest import ImageInput
from bundle.store import open_bundle
from score.ahead import ahead
from score.config import ScoreConfig
from score.drift import Drift, Vocabulary, of_raws
from score.examples import renamed
from score.files import is_local
from score.folder import Folder
from score.parts import PLACE, PartWriter
from score.readers import Chunk, Reader, Wanted
from score.scorer import Encoded, scorer_of
from score.units import Counts, Footer, Plan, Unit, UnitReport

AHEAD = 1  # chunks that are read and preprocessed before they are taken; more would keep units from other processes
RUN_AHEAD = 2  # that are run before they are written, as the disk is slow now and then
STAGES = ("read", "preprocess", "run", "write")


@dataclass(frozen=True)
class _Work:
    """A unit on its way, with the seconds that each stage has worked on it."""

    unit: Unit
    seconds: dict[str, float]

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began


_Piece = tuple[_Work, Chunk | None, Encoded, Drift]  # without a chunk it is the end of the unit


@dataclass(frozen=True)
class Scored:
    """Rows of a unit as they are written, or its end."""

    work: _Work
    table: pa.Table | None
    counts: Counts


class UnitRunner:
    """Scores units and writes their parts. Made where it runs: it holds the session."""

    def __init__(self, config: ScoreConfig, plan: Plan) -> None:
        """Load the bundle.

        Args:
            config: with absolute paths.
            plan: with settings.

        Raises:
            BundleError, DeviceUnavailable, MissingExtra, ModelError: see bundle.model.load_model.
            DataError: another variant of the bundle is run here than where the run began; an input cannot be read.
        """
        assert plan.settings is not None  # they are chosen before any unit is scored
        settings = plan.settings
        self._config, self._plan, self._folder = config, plan, Folder(config.out)
        self._scorer = scorer_of(config, threads=settings.threads, batch=settings.batch, decoders=settings.decoders)
        variant, spec = self._scorer.model.variant.name, self._scorer.model.manifest.input
        if variant != settings.variant:
            raise DataError(
                f"variant {variant!r} of {config.bundle} is run here; the parts in {config.out} are of "
                f"{settings.variant!r}, which answers differently. Go on on a machine of that kind, or choose another "
                "--out."
            )
        has_one_core = self._scorer.model.variant.device == "cpu" and settings.threads == settings.decoders == 1
        paths = [config.out, *(file.path for file in plan.files)]
        self._takes_turns = has_one_core and not isinstance(spec, ImageInput) and all(map(is_local, paths))
        self._vocabulary = Vocabulary(spec, open_bundle(config.bundle).read)
        wanted = Wanted(spec, renamed(config.column, "--column"), renamed(config.keep, "--keep"))
        self._reader = Reader(wanted, plan.files, settings.chunk)
        self._files = {file.path: file for file in plan.files}
        _, types = wanted.columns(plan.files[0].path, plan.files[0].kind)
        self._schema = pa.schema([*PLACE, *(pa.field(*kept) for kept in types.items()), *self._scorer.schema])

    def __call__(self, unit: Unit) -> UnitReport:
        """Score one unit and write its part."""
        return next(self.run([unit]))

    def run(self, units: Iterable[Unit]) -> Iterator[UnitReport]:
        """Score units and yield a report as each is written, in their order.

        The next units are read while the last ones are written. When it is closed, or fails, no part is left half.

        Raises:
            DataError: an input cannot be read, or has changed.
            ModelError: the device fails.
            OSError: a file cannot be read or written.
        """
        with closing(self.scored(units)) as pieces, ExitStack() as stack:
            part: PartWriter | None = None
            counts = Counts()
            for piece in pieces:
                work = piece.work
                if part is None:
                    part = stack.enter_context(PartWriter(self._folder, work.unit, self._schema, self._config.format))
                    counts = Counts()
                if piece.table is not None:
                    with work.timed("write"):
                        part.write(piece.table)
                    counts += piece.counts
                    continue
                with work.timed("write"):
                    size = part.finish(self._footer(work.unit, counts))
                    stack.close()  # now the part has its name
                part = None
                seconds = {stage: round(seconds, 6) for stage, seconds in work.seconds.items()}
                yield UnitReport(unit=work.unit.name, counts=counts, seconds=seconds, bytes=size)

    def _footer(self, unit: Unit, counts: Counts) -> Footer:
        if counts.rows_in != unit.rows:
            raise DataError(f"{unit.file} has changed while it was scored: {unit.name} has {counts.rows_in} rows.")
        return Footer(
            fingerprint=self._plan.fingerprint,
            bundle=self._plan.bundle,
            variant=self._scorer.model.variant.name,
            input=self._files[unit.file],
            unit=unit.name,
            first_row=unit.first_row,
            counts=counts,
        )

    def scored(self, units: Iterable[Unit]) -> Generator[Scored, None, None]:
        """What is written of units: tables, and after the last of each unit one piece without.

        A process with one core takes turns: threads that all want it only hand it to and fro. Many small files, such as
        images, and stores are waited for; then the others work meanwhile.
        """
        if self._takes_turns:
            yield from self._answer(self._encode(self._read(units)))
            return
        read = ahead(self._read(units), AHEAD, "read", join=False)
        encoded = ahead(self._encode(read), AHEAD, "preprocess")
        yield from ahead(self._answer(encoded), RUN_AHEAD, "run")

    def tables(self, units: Iterable[Unit]) -> Generator[pa.Table, None, None]:
        """What would be written of units."""
        with closing(self.scored(units)) as pieces:
            for piece in pieces:
                if piece.table is not None:
                    yield piece.table

    def _read(self, units: Iterable[Unit]) -> Iterator[_Piece]:
        for unit in units:
            work = _Work(unit, dict.fromkeys(STAGES, 0.0))
            with work.timed("read"):
                chunks = self._reader.read(unit)
                chunk = next(chunks, None)
            while chunk is not None:
                yield work, chunk, Encoded(), {}
                with work.timed("read"):
                    chunk = next(chunks, None)
            yield work, None, Encoded(), {}

    def _encode(self, pieces: Iterable[_Piece]) -> Iterator[_Piece]:
        for work, chunk, rows, found in pieces:
            if chunk is not None:
                with work.timed("preprocess"):
                    rows = self._scorer.encode(chunk.raws)
                    found = of_raws(self._scorer.model.manifest.input, chunk.raws)
                    found |= self._vocabulary.count(chunk.raws, rows.rows, chunk.first_row)
            yield work, chunk, rows, found

    def _answer(self, pieces: Iterable[_Piece]) -> Iterator[Scored]:
        for work, chunk, rows, found in pieces:
            if chunk is None:
                yield Scored(work, None, Counts())
                continue
            with work.timed("run"):
                answered = self._scorer.answer(rows)
                table = self._table(chunk, answered.table)
            ok = len(table) - answered.bad
            counts = Counts(rows_in=len(table), rows_ok=ok, rows_bad=answered.bad, drift=found | answered.drift)
            yield Scored(work, table, counts)

    def _table(self, chunk: Chunk, answers: pa.Table) -> pa.Table:
        one = isinstance(chunk.files, str)
        files = _repeated(chunk.files, len(answers)) if one else pa.array(chunk.files, pa.string())
        numbers = np.arange(chunk.first_row, chunk.first_row + len(answers), dtype=np.int64)
        columns = [files, pa.array(numbers), *chunk.keep.values(), *answers.columns]
        return pa.Table.from_arrays(columns, schema=self._schema)


@lru_cache(maxsize=4)
def _repeated(file: str, count: int) -> pa.Array:
    """A column with the path of one file."""
    return pa.repeat(file, count)
