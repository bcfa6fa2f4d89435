"""A run: plan, units, totals."""

from collections.abc import Callable, Generator, Sequence

import msgspec

from bundle.log import log
from bundle.manifest import Record
from bundle.signals import terminable
from bundle.store import read_manifest
from score import autotune, local, parts, report
from score.config import ScoreConfig
from score.folder import Folder
from score.plan import prepare, record, shard
from score.progress import follow
from score.units import Counts, Plan, Settings, Unit, UnitReport

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

    SIGTERM and Ctrl-C end it; see bundle.signals.

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
    engine = engine or _named(config)
    with terminable():
        return _run(*_planned(config), engine)


def _planned(config: ScoreConfig) -> tuple[ScoreConfig, Plan]:
    """The configuration with absolute paths, and the plan with settings, which is in the folder now."""
    try:
        config, plan = prepare(config)
        if plan.settings is None:
            plan = record(Folder(config.out), autotune.tune(config, plan))
    except SystemExit:
        log.warning("stopped while the run was planned. The same command goes on from there.")
        raise
    return config, autotune.override(config, plan)


def _run(config: ScoreConfig, plan: Plan, engine: Engine) -> Result:
    assert plan.settings is not None
    folder = Folder(config.out)
    done = parts.done(folder, plan)
    left = [unit for unit in shard(config, plan.units) if unit.name not in done]
    if done and left:
        log.info("going on", parts=len(done), of=len(plan.units))
    if len(done) < len(plan.units):
        folder.remove(parts.SUCCESS)  # of a finished run that has lost parts since
    reports = engine(config, plan, left) if left else _nothing()
    outcome = follow(reports, plan, done=parts.total(done), max_error_rate=config.max_error_rate)
    done = parts.done(folder, plan)
    if len(done) == len(plan.units) and folder.read(parts.SUCCESS) is None:
        whole = msgspec.structs.replace(outcome, counts=parts.total(done))  # with what other shards have scored
        for name, data in report.files(read_manifest(config.bundle), plan, whole).items():
            folder.write(name, data)
        parts.finish(folder, plan, parts.total(done))
    return Result(
        out=config.out,
        counts=parts.total(done),
        parts=len(done),
        missing=len(plan.units) - len(done),
        settings=plan.settings,
    )


def _named(config: ScoreConfig) -> Engine:
    """The engine that the configuration names, which is installed."""
    if config.engine == "ray":
        from score import ray_engine

        ray_engine.check(config.ray_address)
        return ray_engine.reports
    return local.reports


def _nothing() -> Generator[UnitReport, None, None]:
    yield from ()
