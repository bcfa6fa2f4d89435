"""Chooses how a run shares out this machine, by scoring its first rows in a few ways for a few seconds."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier

import msgspec

from bundle.host import cpu_count, trim_memory
from bundle.log import log
from bundle.manifest import Input, Variant
from bundle.model import MAX_ROWS, load_model
from bundle.preprocess import is_sequence
from score.config import ScoreConfig
from score.local import run_units
from score.plan import row_s
from score.runner import UnitRunner
from score.units import Counts, Plan, Settings, Trial, Unit, UnitReport

CHUNK = 8192  # rows that are read and preprocessed together, at most
_CHUNK_S = 0.5  # of one core, about
_SORTED = 8  # batches, that texts are sorted by length for
WORTH_S = 60.0  # of one core; what is done before is not worth trials, which take a second or two each
SHARED_S = 10.0  # of one core; what is done before is not worth a second process
TRIAL_S = 0.5
GAIN = 1.05  # that more processes, which cost memory, have to bring
_TABLES = 4  # that a trial counts at least
_UNITS = 4  # the first, over and over
_SPLITS = 3  # ways to share out cores that are tried, at most
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_RUN_S = 0.15  # longest run that is tried: a larger batch would gain nothing
_START_S = 120.0  # until all processes have loaded the model


def tune(config: ScoreConfig, plan: Plan) -> Plan:
    """The plan with settings, and with the trials by which they were chosen; options that were given are kept.

    Nothing is written. First the batch is chosen, in this process, then processes × threads, in processes of their
    own. Where answers depend on the batch it is 1. On a GPU one process runs the model, and all cores preprocess.

    Args:
        config: of the run, with absolute paths.
        plan: without settings.

    Raises:
        BundleError, DataError, DeviceUnavailable, ModelError, OSError: the first rows cannot be scored.
    """
    model = load_model(config.bundle, device=config.device, threads=1)
    variant, spec = model.variant, model.manifest.input
    del model
    tried, shared = batches(config, variant), splits(config, variant, len(plan.units))
    seconds = plan.rows * row_s(variant, spec)
    first = _settings(config, variant, *shared[0], tried[-1])
    untried = _settings(config, variant, *shared[-1 if seconds >= SHARED_S else 0], tried[-1])
    trials = list(_trials(config, plan, first, tried, shared[1:])) if seconds >= WORTH_S else []
    chosen = _best(trials) or untried
    chosen = msgspec.structs.replace(chosen, chunk=_chunk(variant, spec, chosen.batch))
    trim_memory()
    log.info("settings", **msgspec.structs.asdict(chosen), trials=len(trials))
    return msgspec.structs.replace(plan, settings=chosen, trials=tuple(trial for _, trial in trials))


def override(config: ScoreConfig, plan: Plan) -> Plan:
    """The plan of a run that goes on, with the options that were given this time in the place of its settings."""
    assert plan.settings is not None
    given = {name: getattr(config, name) for name in ("processes", "threads", "batch", "decoders")}
    changed = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(plan, settings=msgspec.structs.replace(plan.settings, **changed))


def batches(config: ScoreConfig, variant: Variant) -> Sequence[int]:
    """Ascending; with the last begins who tries nothing."""
    if not variant.batch_invariant:
        return (1,)
    if config.batch:
        return (min(config.batch, MAX_ROWS),)
    if variant.device != "cpu":
        return _BATCHES[-3:]
    return [rows for rows in _BATCHES if rows == 1 or rows * variant.latency.p50_ms / 1e3 <= _RUN_S][-3:]


def splits(config: ScoreConfig, variant: Variant, units: int) -> Sequence[tuple[int, int]]:
    """Processes × threads of each, one process first."""
    cores = cpu_count()
    if config.processes:
        return [(config.processes, config.threads or max(1, cores // config.processes))]
    alone = (1, config.threads or cores)
    if variant.device != "cpu":
        return [alone]
    most = min(cores // (config.threads or 1), units)
    halved = [most >> i for i in range(_SPLITS) if most >> i > 1]
    return [alone, *((processes, config.threads or cores // processes) for processes in reversed(halved))]


def _settings(config: ScoreConfig, variant: Variant, processes: int, threads: int, batch: int) -> Settings:
    decoders = config.decoders or (threads if variant.device == "cpu" else max(1, cpu_count() // processes))
    chunk = min(CHUNK, max(2 * batch, int(_RUN_S / 3 / (variant.latency.p50_ms / 1e3))))
    return Settings(
        variant=variant.name, processes=processes, threads=threads, batch=batch, decoders=decoders, chunk=chunk
    )


def _chunk(variant: Variant, spec: Input, batch: int) -> int:
    return min(CHUNK, max((_SORTED if is_sequence(spec) else 2) * batch, int(_CHUNK_S / row_s(variant, spec))))


def _trials(
    config: ScoreConfig, plan: Plan, first: Settings, tried: Sequence[int], others: Sequence[tuple[int, int]]
) -> Iterator[tuple[Settings, Trial]]:
    """Settings with what was measured of them; where the number of processes was given, of one of them."""
    best, highest = first, 0.0
    for batch in tried if len(tried) + len(others) > 1 else ():
        settings = msgspec.structs.replace(first, batch=batch)
        rate = _alone(config, plan, settings)
        yield settings, _trial(msgspec.structs.replace(settings, processes=1), rate)
        if rate > highest:
            best, highest = settings, rate
    for processes, threads in others:
        decoders = config.decoders or threads
        settings = msgspec.structs.replace(best, processes=processes, threads=threads, decoders=decoders)
        yield settings, _trial(settings, _together(config, plan, settings))


def _trial(settings: Settings, rate: float) -> Trial:
    return Trial(
        processes=settings.processes,
        threads=settings.threads,
        batch=settings.batch,
        decoders=settings.decoders,
        rows_per_s=rate,
    )


def _best(trials: Sequence[tuple[Settings, Trial]]) -> Settings | None:
    best: tuple[Settings, Trial] | None = None
    for settings, trial in trials:
        gain = GAIN if best and trial.processes > best[1].processes else 1.0
        if best is None or trial.rows_per_s > gain * best[1].rows_per_s:
            best = settings, trial
    return best and best[0]


def _alone(config: ScoreConfig, plan: Plan, settings: Settings) -> float:
    """Rows a second of this process."""
    report = next(_TrialRunner(config, msgspec.structs.replace(plan, settings=settings), None).run(plan.units[:1]))
    return report.counts.rows_in / report.seconds["trial"]


def _together(config: ScoreConfig, plan: Plan, settings: Settings) -> float:
    """Rows a second of several processes, all at work at the same time."""
    ready = get_context("spawn").Barrier(settings.processes, timeout=_START_S)
    start = partial(_TrialRunner, config, msgspec.structs.replace(plan, settings=settings), ready)
    reports = run_units(start, plan.units[: settings.processes], processes=settings.processes)
    return sum(report.counts.rows_in / report.seconds["trial"] for report in reports)


class _TrialRunner:
    """Scores the first units again and again for a while, instead of the one that it is given, and writes none."""

    def __init__(self, config: ScoreConfig, plan: Plan, ready: Barrier | None) -> None:
        self._runner = UnitRunner(config, plan)
        self._units = [unit for unit in plan.units if unit.rows][:_UNITS]
        self._ready = ready

    def run(self, units: Iterable[Unit], /) -> Iterator[UnitReport]:
        for unit in units:
            rows, seconds = self._measure()
            counts = Counts(rows_in=rows)
            yield UnitReport(unit=unit.name, counts=counts, seconds={"trial": seconds}, bytes=0)

    def _measure(self) -> tuple[int, float]:
        """Rows, and the seconds that they took, once the first rows had come through."""
        with closing(self._runner.tables(cycle(self._units))) as tables:
            next(tables)
            if self._ready is not None:
                self._ready.wait()
            began, rows = time.perf_counter(), 0
            for number, table in enumerate(tables, 1):
                rows += len(table)
                seconds = time.perf_counter() - began
                if seconds >= TRIAL_S and number >= _TABLES:
                    return rows, seconds
        raise AssertionError("the units never end")
