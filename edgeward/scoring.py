"""`edgeward score`."""

from typing import Annotated

from cyclopts import Parameter
from rich.text import Text

from edgeward.result import give
from score.config import ScoreConfig
from score.run import Result
from score.run import score as run


def score(config: Annotated[ScoreConfig, Parameter(name="*")], *, json: bool = False) -> None:
    """Score every row of files with a bundle; run again, it goes on where it was stopped.

    Args:
        config: see ScoreConfig.
        json: give the totals as one JSON object.
    """
    result = run(config)
    give(result, _render(result), json=json)


def _render(result: Result) -> Text:
    counts = result.counts
    bad = f", {counts.rows_bad:,} of them bad (_status, _error)" if counts.rows_bad else ""
    text = f"{result.out}: {counts.rows_in:,} rows in {result.parts} parts{bad}."
    if result.missing:
        text += f" {result.missing} of {result.parts + result.missing} parts are still to be scored by other shards."
    return Text(text)
