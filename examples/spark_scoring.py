"""Scoring on Spark: python examples/spark_scoring.py BUNDLE INPUT ... --out DIR [--master URL]

Two ways, both with mapInArrow. `units` is an engine of `edgeward score`: Spark is given the units of work and gives
back their reports, while the executors read the input and write the parts themselves. So the files are the same as
without Spark, byte for byte, and a run that one began the other can finish. This is what the command line does. Bundle,
input and output have the same paths on every executor, and edgeward with its extra `score` is installed there.

`rows` gives every row of a DataFrame its answers, whatever table the rows come from. What is done with them, and how
often after a failure, is then up to Spark and its sink.
"""

import argparse
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa

from score.config import ScoreConfig
from score.examples import choose_columns, from_arrow
from score.run import score
from score.runner import UnitRunner
from score.scorer import Scorer
from score.units import Plan, Unit, UnitReport
from score.usage import measured

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

Batches = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]

REPORT = pa.schema([("report", pa.binary())])
TASKS_PER_CORE = 4  # so that one slow task is not waited for at the end


def units(config: ScoreConfig, plan: Plan, left: Sequence[Unit]) -> Generator[UnitReport, None, None]:
    """The engine: the report of each unit, all of them when Spark is done."""
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.getOrCreate()
    tasks = min(len(left), TASKS_PER_CORE * spark.sparkContext.defaultParallelism)
    if tasks:
        names = spark.createDataFrame([(unit.name,) for unit in left], "unit string").repartition(tasks)
        for row in names.mapInArrow(score_units(config, plan), "report binary").collect():
            yield msgspec.json.decode(row.report, type=UnitReport)


def score_units(config: ScoreConfig, plan: Plan) -> Batches:
    """What an executor does with the names of units: it loads the bundle once, and writes a part for each."""
    by_name = {unit.name: unit for unit in plan.units}

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        named = [by_name[name] for batch in batches for name in batch.column("unit").to_pylist()]
        if named:
            for report in measured(UnitRunner(config, plan).run(named)):
                yield pa.record_batch([[msgspec.json.encode(report)]], schema=REPORT)

    return run


def rows(frame: "DataFrame", bundle: Path) -> "DataFrame":
    """A DataFrame of examples with the columns of their answers, `_status` and `_error`."""
    from pyspark.sql.pandas.types import from_arrow_schema
    from pyspark.sql.types import StructType

    answers = from_arrow_schema(Scorer(bundle).schema)
    return frame.mapInArrow(score_rows(bundle), StructType([*frame.schema.fields, *answers.fields]))


def score_rows(bundle: Path) -> Batches:
    """What an executor does with rows."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        scorer = Scorer(bundle, threads=1)  # Spark runs a task on every core
        spec = scorer.model.manifest.input
        for batch in batches:
            given = pa.Table.from_batches([batch])
            columns = choose_columns(spec, {}, {}, given.column_names, "the DataFrame")
            answers = scorer.score(from_arrow(columns, given))
            for name, column in zip(answers.column_names, answers.columns, strict=True):
                given = given.append_column(name, column)
            yield from given.combine_chunks().to_batches()

    return run


def main() -> None:
    from pyspark.sql import SparkSession

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--master", default="local[*]")
    options = parser.parse_args()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.master(options.master).appName("edgeward").config("spark.ui.enabled", "false")
    if options.master.startswith("local"):
        spark = spark.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
    session = spark.getOrCreate()
    try:
        config = ScoreConfig(options.bundle, tuple(options.inputs), out=options.out, processes=1, threads=1)
        result = score(config, units)
    finally:
        session.stop()
    print(f"{result.counts.rows_ok} of {result.counts.rows_in} rows scored; {result.parts} parts in {result.out}")


if __name__ == "__main__":
    main()
