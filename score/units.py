"""The records of a run: what is to be scored, in which pieces, and what came of each."""

from typing import Literal

import msgspec

from bundle.manifest import Record

Kind = Literal["parquet", "csv", "jsonl", "npz", "images"]


class InputFile(Record, frozen=True, kw_only=True):
    """A file as it was found; of images, all of one folder, list or glob together."""

    path: str  # absolute, or a URL
    kind: Kind
    size: int  # bytes
    version: str  # time of the last change in ns; of images, the sha256 over paths, sizes and times


class Unit(Record, frozen=True, kw_only=True):
    """Rows [first_row, first_row + rows) of one file: what is scored, written and resumed as a whole."""

    file: str  # its path
    index: int  # of the file in the plan
    part: int  # of the unit in its file
    kind: Kind
    first_row: int
    rows: int
    start: int  # CSV, JSONL: bytes [start, stop) of the file; Parquet: row groups [start, stop) hold the rows
    stop: int
    entries: tuple[str, ...] = ()  # of images, the path of each

    @property
    def name(self) -> str:
        """Of its part, without the suffix."""
        return f"part-{self.index:06d}-{self.part:06d}"


class Settings(Record, frozen=True, kw_only=True):
    """How fast, not what: chosen once, before the first unit, and used by every run that goes on with it."""

    variant: str  # of the bundle, as this kind of machine chooses it
    processes: int
    threads: int  # of one session run
    batch: int  # rows of one session run
    decoders: int  # threads of each process that preprocess
    chunk: int  # rows that are read and preprocessed together


class Trial(Record, frozen=True, kw_only=True):
    """How fast some settings were on the first rows."""

    processes: int
    threads: int
    batch: int
    decoders: int
    rows_per_s: float


class Plan(Record, frozen=True, kw_only=True):
    """Everything that a run does. It is written before the first unit, and a run that goes on reads it."""

    fingerprint: str  # sha256 of bundle, options and files
    bundle: str  # sha256 of its manifest
    options: dict[str, str]  # those that change what is written
    files: tuple[InputFile, ...]
    units: tuple[Unit, ...]
    settings: Settings | None = None
    trials: tuple[Trial, ...] = ()  # that the settings were chosen by

    @property
    def rows(self) -> int:
        """Of all units, as they were counted before anything was scored."""
        return sum(unit.rows for unit in self.units)


class Counts(Record, frozen=True, kw_only=True):
    """What came of a unit, or of several; equal whenever and wherever it is scored."""

    rows_in: int = 0
    rows_ok: int = 0
    rows_bad: int = 0  # rows_in - rows_ok
    drift: dict[str, tuple[int, ...]] = msgspec.field(
        default_factory=dict
    )  # name -> counts that are added up, as score.drift defines them

    def __add__(self, other: "Counts") -> "Counts":
        """The counts of both."""
        drift = dict(self.drift)
        for name, values in other.drift.items():
            drift[name] = tuple(map(sum, zip(drift.get(name, (0,) * len(values)), values, strict=True)))
        return Counts(
            rows_in=self.rows_in + other.rows_in,
            rows_ok=self.rows_ok + other.rows_ok,
            rows_bad=self.rows_bad + other.rows_bad,
            drift=drift,
        )


class Footer(Record, frozen=True, kw_only=True):
    """What a part says of itself, in its Parquet metadata under `edgeward`, or in the file `_PART.json` beside it."""

    fingerprint: str  # of the plan
    bundle: str  # sha256 of its manifest
    variant: str
    input: InputFile
    unit: str  # name
    first_row: int
    counts: Counts


class UnitReport(Record, frozen=True, kw_only=True):
    """One unit that has been scored and written."""

    unit: str  # name
    counts: Counts
    seconds: dict[str, float]  # read, preprocess, run, write: time that each stage worked on it
    bytes: int  # of the part
    process: str = ""  # HOST:PID, and what it had cost by then, as score.usage measures it:
    wall_s: float = 0.0  # since it was ready to score
    cpu_s: float = 0.0  # since then, of all its threads
    peak_rss: int = 0  # bytes


class Success(Record, frozen=True, kw_only=True):
    """The file _SUCCESS, written last."""

    fingerprint: str
    counts: Counts
    parts: dict[str, str]  # file -> sha256


def to_json(record: msgspec.Struct) -> bytes:
    """The record on one line."""
    return msgspec.json.encode(record) + b"\n"
