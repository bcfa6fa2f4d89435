"""Runs of offline scoring in this process, on the tiny bundles of tests.serve_bundles."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from score.config import ScoreConfig
from score.run import Result, score

TEXTS = ["the film is good", "", "bad", "a film, the\nfilm", 'a "film" is bad', "é film", "the the the the the the"]


def config(bundle, *inputs, out, **options) -> ScoreConfig:
    options = {"processes": 1, "threads": 1, "batch": 4, "decoders": 1, **options}
    return ScoreConfig(bundle, tuple(map(str, inputs)), out=str(out), **options)


def run(bundle, *inputs, out, **options) -> Result:
    return score(config(bundle, *inputs, out=out, **options))


def scored(bundle, *inputs, out, **options) -> pa.Table:
    """The rows of all parts, in the order of their names."""
    run(bundle, *inputs, out=out, **options)
    return read(out)


def read(out: Path) -> pa.Table:
    return pa.concat_tables(parquet.read_table(part) for part in sorted(Path(out).glob("part-*.parquet")))


def lists(table, column) -> np.ndarray:
    """A column of lists as float32 (N, width)."""
    return np.array(table[column].to_pylist(), np.float32)


def tree(out: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, but for reports, which tell how long it took."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if not path.name.startswith("_report")}


def write_csv(path: Path, columns) -> Path:
    csv.write_csv(pa.table(columns), path)
    return path
