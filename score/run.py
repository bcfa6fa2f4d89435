"""A run: plan, units, totals."""

from collections.abc import Callable, Generator, Sequence

import msgspec
import structlog

from bundle.manifest import Record
from bundle.store import read_manifest
from score import local, parts, report
from score.autotune import tune
from score.config import ScoreConfig
from score.folder import Folder
from score.plan import prepare, record, shard
from score.progress import Outcome, follow
from score.units import Counts, Plan, Settings, Unit, UnitReport

log = structlog.get_logger()

Engine = Callable[[ScoreConfig, Plan, Sequence[Unit]], Generator[UnitReport, None, None]]
"""Scores units and gives a report as each is written, in any order; closing it stops what it has started."""


class Result(Record, frozen=True, kw_only=True):
    """What a run has come to."""

    out: str
    counts: Counts  # of every part that is there
    parts: int
    missing: int  # parts that other shards are still to write
    settings: Settings


def score(config: ScoreConfig, engine: Engine | None = None) -> Result:
    """Score every row of the input, or go on where an earlier run was stopped.

    Args:
        config: what is to be scored, and how.
        engine: scores the units; by default the one that the configuration names.

    Raises:
        BundleError, DeviceUnavailable, MissingExtra, ModelError: the bundle cannot be run.
        DataError: an input or an option cannot be used, or the folder holds another run.
        OutputExists: the folder holds something that is no run.
        TooManyBadRows: more than --max-error-rate allows.
    """
    report.check_extras()
    config, plan = prepare(config)
    folder = Folder(config.out)
    if plan.settings is None:
        plan = record(folder, tune(config, plan))
    assert plan.settings is not None
    done = parts.done(folder, plan)
    left = [unit for unit in shard(config, plan.units) if unit.name not in done]
    if done:
        log.info("going on", parts=len(done), of=len(plan.units))
    earlier = sum((footer.counts for footer in done.values()), Counts())
    reports = _choose(engine, config)(config, plan, left)
    outcome = follow(reports, plan, done=earlier, max_error_rate=config.max_error_rate)
    _report(config, folder, plan, outcome)
    success = parts.finish(folder, plan)
    done = parts.done(folder, plan) if success is None else {}
    counts = sum((footer.counts for footer in done.values()), Counts()) if success is None else success.counts
    written = len(done) if success is None else len(plan.units)
    return Result(
        out=config.out, counts=counts, parts=written, missing=len(plan.units) - written, settings=plan.settings
    )


def _choose(engine: Engine | None, config: ScoreConfig) -> Engine:
    if engine is not None:
        return engine
    if config.engine == "ray":
        from score.ray_engine import reports

        return reports
    return local.reports


def _report(config: ScoreConfig, folder: Folder, plan: Plan, outcome: Outcome) -> None:
    """Write the report once every part is there; where nothing was left to do, that of the run that did it stays."""
    footers = parts.done(folder, plan)
    if len(footers) < len(plan.units) or (not outcome.rows and folder.read(report.JSON) is not None):
        return
    counts = sum((footer.counts for footer in footers.values()), Counts())
    whole = msgspec.structs.replace(outcome, counts=counts)
    for name, data in report.files(read_manifest(config.bundle), plan, whole).items():
        folder.write(name, data)
