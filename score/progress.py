"""Follows a run: counts what comes in, shows how far it is, and stops it when too much of it is bad."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from bundle.log import log
from bundle.manifest import Record
from bundle.signals import terminable
from score.errors import TooManyBadRows
from score.units import Counts, Plan, UnitReport

LOG_EVERY_S = 30.0  # where nobody looks at a bar
_WINDOW_S = 600.0  # that the time left is estimated from; a unit may take minutes


class Process(Record, frozen=True, kw_only=True):
    """What one of the processes that scored has cost."""

    name: str  # HOST:PID
    units: int
    rows: int
    wall_s: float  # from when it was ready to score to its last unit
    cpu_s: float  # meanwhile, of all its threads
    peak_rss: int  # bytes


class Outcome(Record, frozen=True, kw_only=True):
    """What came of a run, and what it has cost; of a run that went on, the costs are those since then."""

    counts: Counts  # of all units, those that were done before as well
    rows: int  # that were scored now
    wall_s: float
    seconds: dict[str, float]  # by stage, over all processes
    bytes: int  # of the parts that were written now
    processes: tuple[Process, ...]


class _Totals:
    """What the reports add up to."""

    def __init__(self, done: Counts) -> None:
        self.counts = done
        self.rows = self.bytes = 0  # of this run
        self.seconds: dict[str, float] = {}
        self.processes: dict[str, Process] = {}
        self._began = time.perf_counter()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._began

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / max(self.wall_s, 1e-9)

    def add(self, report: UnitReport) -> None:
        self.counts += report.counts
        self.rows += report.counts.rows_in
        self.bytes += report.bytes
        for stage, seconds in report.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        before = self.processes.get(report.process)
        self.processes[report.process] = Process(
            name=report.process,
            units=1 + (before.units if before else 0),
            rows=report.counts.rows_in + (before.rows if before else 0),
            wall_s=report.wall_s,
            cpu_s=report.cpu_s,
            peak_rss=report.peak_rss,
        )

    def outcome(self) -> Outcome:
        return Outcome(
            counts=self.counts,
            rows=self.rows,
            wall_s=self.wall_s,
            seconds=dict(self.seconds),
            bytes=self.bytes,
            processes=tuple(self.processes.values()),
        )


def follow(
    reports: Generator[UnitReport, None, None],
    plan: Plan,
    *,
    done: Counts,
    max_error_rate: float = 1.0,
) -> Outcome:
    """Take the report of every unit, and tell on stderr how far the run is.

    SIGTERM and Ctrl-C end the run. Whatever ends it, the engine is closed first.

    Args:
        reports: of an engine.
        plan: of the run.
        done: of the units that are not in `reports`, because they were scored before.
        max_error_rate: largest fraction of all rows of the plan that may be bad.

    Raises:
        TooManyBadRows: it is certain that more rows are bad; the parts that were written stay.
    """
    totals = _Totals(done)
    with terminable(), _shown(plan, done) as show, closing(reports):
        try:
            _check(totals.counts, plan, max_error_rate)
            for report in reports:
                totals.add(report)
                show(totals)
                _check(totals.counts, plan, max_error_rate)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(_stopped(totals, plan)) from error
        except SystemExit:
            log.warning(_stopped(totals, plan))
            raise
    return totals.outcome()


def _stopped(totals: _Totals, plan: Plan) -> str:
    """What is said of a run that a signal has ended."""
    return f"stopped at {totals.counts.rows_in} of {plan.rows} rows. The same command goes on from there."


def _check(counts: Counts, plan: Plan, max_error_rate: float) -> None:
    """Stop when too many rows are bad, whatever the others are."""
    if counts.rows_bad / max(plan.rows, 1) > max_error_rate:
        raise TooManyBadRows(
            f"{counts.rows_bad} of the {counts.rows_in} rows that were scored are bad; of all {plan.rows} at most "
            f"{max_error_rate:.4g} may be (--max-error-rate). The parts that were written stay, and the column _error "
            "says what is wrong. With a higher --max-error-rate the same command goes on from there."
        )


@contextmanager
def _shown(plan: Plan, done: Counts) -> Iterator[Callable[[_Totals], None]]:
    """The function that shows totals: on a bar where stderr is a terminal, else in a line of the log now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(plan)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, speed_estimate_period=_WINDOW_S) as progress:
        task = progress.add_task("rows", total=plan.rows, completed=done.rows_in, rate=0.0, bad=done.rows_bad)
        yield lambda totals: progress.update(
            task, completed=totals.counts.rows_in, rate=totals.rate, bad=totals.counts.rows_bad
        )


class _Rate(ProgressColumn):
    """Rows a second, and how many were bad."""

    def render(self, task: Task) -> Text:
        rate, bad = task.fields["rate"], task.fields["bad"]
        return Text(f"{rate:,.0f} rows/s, {bad:,} bad" if rate else "", style="progress.data.speed")


class _Lines:
    """A line of the log, not too often."""

    def __init__(self, plan: Plan) -> None:
        self._of = plan.rows
        self._next = LOG_EVERY_S  # since the run began

    def __call__(self, totals: _Totals) -> None:
        if totals.wall_s < self._next:
            return
        self._next = totals.wall_s + LOG_EVERY_S
        left_s = (self._of - totals.counts.rows_in) / totals.rate
        log.info(
            "scoring",
            rows=totals.counts.rows_in,
            of=self._of,
            bad=totals.counts.rows_bad,
            rows_per_s=round(totals.rate, 1),
            left_s=round(left_s),
        )
