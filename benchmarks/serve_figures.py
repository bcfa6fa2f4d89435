"""Figures that benchmarks/serve_speed.py gives: each beside its goal, printed and kept."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from benchmarks.serve_load import Load

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    out: Path  # where models are kept
    rounds: int
    seconds: float  # of one side in one round


@dataclass(frozen=True)
class Figure:
    """One of them."""

    goal: str
    what: str
    value: float
    sense: Literal["<=", ">=", ""] = ""
    limit: float | None = None  # None: it is only told
    said: str = ""

    @property
    def verdict(self) -> str:
        """Whether the goal is met."""
        if self.limit is None:
            return ""
        met = self.value <= self.limit if self.sense == "<=" else self.value >= self.limit
        return "met" if met else "MISSED"

    def line(self) -> str:
        """Of the table."""
        limit = "" if self.limit is None else f"{self.sense} {self.limit:g}"
        return f"| {self.goal} | {self.what} | {self.value:.3g} | {limit} | {self.verdict} | {self.said} |"


def in_turns(sides: Mapping[str, Callable[[], Load]], rounds: int) -> dict[str, list[Load]]:
    """Every side once in each round: A B C, C B A, and so on."""
    found: dict[str, list[Load]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            found[name].append(sides[name]())
    return found


def ratio(ours: Sequence[Load], theirs: Sequence[Load], of: Callable[[Load], float]) -> float:
    """The median of the ratios, round by round."""
    return median(of(a) / of(b) for a, b in zip(ours, theirs, strict=True))


def middle(loads: Sequence[Load], of: Callable[[Load], float]) -> float:
    """The median over the rounds."""
    return median(map(of, loads))


def table(figures: Sequence[Figure]) -> str:
    """All of them, in Markdown."""
    head = "| goal | figure | measured | wanted | | beside it |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(figure.line() for figure in figures)])


def keep(name: str, title: str, figures: Mapping[str, Sequence[Figure]], order: Sequence[str]) -> None:
    """Write benchmarks/results/NAME.md and NAME.json.

    Args:
        name: of the files.
        title: what stands above the table.
        figures: by part; parts that were not measured now stay as they were kept before.
        order: of the parts.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = {part: [Figure(**each) for each in told] for part, told in before.items()} | dict(figures)
    kept = {part: kept[part] for part in order if part in kept}
    path.write_text(json.dumps({part: [asdict(each) for each in told] for part, told in kept.items()}, indent=1) + "\n")
    everything = [figure for told in kept.values() for figure in told]
    path.with_suffix(".md").write_text(f"{title}\n\n{table(everything)}\n")
