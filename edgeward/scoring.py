"""`edgeward score`."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.text import Text

from bundle.errors import MissingExtra
from edgeward.result import give
from score.config import ScoreConfig

if TYPE_CHECKING:
    from score.run import Result


def score(config: Annotated[ScoreConfig, Parameter(name="*")], *, json: bool = False) -> None:
    """Score every row of files with a bundle; run again, it goes on where it was stopped.

    Args:
        config: see ScoreConfig.
        json: give the totals as one JSON object.
    """
    try:
        from score.run import score as run
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed. Install edgeward with its extra 'score'.") from error
    result = run(config)
    give(result, _render(result), json=json)


def _render(result: "Result") -> Text:
    counts = result.counts
    bad = f", {counts.rows_bad:,} of them bad (_status, _error)" if counts.rows_bad else ""
    text = f"{result.out}: {counts.rows_in:,} rows in {result.parts} parts{bad}."
    if result.missing:
        text += f" {result.missing} of {result.parts + result.missing} parts are still to be scored by other shards."
    return Text(text)
