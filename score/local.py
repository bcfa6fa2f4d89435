"""The engine of one machine: processes that score units side by side, each unit handed out when one asks for it."""

import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol

from bundle.errors import EdgewardError
from bundle.log import configure as configure_log
from bundle.log import log
from bundle.signals import terminable
from score.config import ScoreConfig
from score.errors import WorkerDied
from score.runner import UnitRunner
from score.units import Plan, Unit, UnitReport
from score.usage import measured

# A process keeps the memory of a chunk for the next one: Arrow's allocator would give it back, and every chunk begin
# with page faults: a vector then takes 2.3 µs of a core instead of 1.9. It reads this when it is loaded.
_ALLOCATOR = {"MIMALLOC_PURGE_DELAY": "-1"}
MAX_DEATHS = 2  # of processes that had the same unit in hand
_CLOSING_S = 10.0  # to remove what is half-written


class Runner(Protocol):
    """Scores units; score.runner.UnitRunner is one."""

    def run(self, units: Iterable[Unit], /) -> Iterator[UnitReport]:
        """A report for each unit, which is read ahead of time."""


Start = Callable[[], Runner]


def reports(config: ScoreConfig, plan: Plan, units: Sequence[Unit]) -> Generator[UnitReport, None, None]:
    """Score units by the settings of the plan; see run_units."""
    assert plan.settings is not None  # they were chosen before the first unit
    return run_units(partial(UnitRunner, config, plan), units, processes=plan.settings.processes)


def run_units(start: Start, units: Sequence[Unit], *, processes: int) -> Generator[UnitReport, None, None]:
    """Score units and yield a report as each is written, in no particular order.

    Args:
        start: loads the model. With several processes it is called in each, and must therefore pickle.
        units: what is left to do.
        processes: that run side by side, spawned; 1 runs in this process.

    Raises:
        WorkerDied: two processes were killed, or crashed, that had the same unit in hand.
        EdgewardError, OSError: a process raised it.
    """
    if processes == 1:
        yield from measured(start().run(units))
        return
    pool = _Pool(start, units)
    try:
        for _ in range(min(processes, len(units))):
            pool.hire()
        while pool.workers:
            yield from pool.next_reports()
    finally:
        pool.close()


@dataclass(eq=False)
class _Worker:
    """A process, and the parent's ends of its pipes."""

    process: SpawnProcess
    asks: Connection  # it sends a byte for a unit, and gets one, or None
    tells: Connection  # it sends what came of units, or the error that ended it
    in_hand: dict[str, Unit] = field(default_factory=dict)


class _Pool:
    """The processes and the units that none of them has yet."""

    def __init__(self, start: Start, units: Iterable[Unit]) -> None:
        self.workers: list[_Worker] = []
        self._start = start
        self._left = list(reversed([*units]))  # the next one is the last
        self._deaths: Counter[str] = Counter()
        self._hired = 0

    def hire(self) -> None:
        """Start one more process."""
        context = get_context("spawn")  # a fork would share the threads' locks, and ONNX Runtime's threads not at all
        asks, asked = context.Pipe()
        tells, told = context.Pipe()
        process = context.Process(
            target=_work, args=(self._start, asked, told, self._hired), name=f"scorer {self._hired}", daemon=True
        )
        self._hired += 1
        resource_tracker.ensure_running()  # or start() would do it, and unblock signals
        os.environ.update(_ALLOCATOR | os.environ)  # inherited, as the next line is
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a Ctrl-C is for the parent
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        asked.close()  # or its end would keep the pipes open after its death
        told.close()
        self.workers.append(_Worker(process, asks, tells))

    def next_reports(self) -> Iterator[UnitReport]:
        """Wait until a process asks, tells or ends; see to it, and yield what was told."""
        ready = set(wait([end for worker in self.workers for end in (worker.asks, worker.tells)]))
        for worker in tuple(self.workers):
            if worker.asks in ready:
                self._hand_out(worker)
            if worker.tells in ready:
                yield from self._hear(worker)

    def close(self) -> None:
        """End the processes, and let them remove what they had half-written."""
        for worker in self.workers:
            worker.process.terminate()
            worker.asks.close()
            worker.tells.close()
        for worker in self.workers:
            worker.process.join(_CLOSING_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers.clear()

    def _hand_out(self, worker: _Worker) -> None:
        with suppress(EOFError, OSError):  # it died; `tells` says so as well
            worker.asks.recv_bytes()
            unit = self._left.pop() if self._left else None
            if unit is not None:
                worker.in_hand[unit.name] = unit
            worker.asks.send(unit)

    def _hear(self, worker: _Worker) -> Iterator[UnitReport]:
        try:
            told = worker.tells.recv()
        except (EOFError, OSError):  # reset where it was killed with something unread
            self._bury(worker)
            return
        if isinstance(told, Exception):
            raise told
        worker.in_hand.pop(told.unit)
        yield told

    def _bury(self, worker: _Worker) -> None:
        """Put back what a process had in hand when it ended, and start another one in its place."""
        worker.process.join()
        worker.asks.close()
        worker.tells.close()
        self.workers.remove(worker)
        if worker.process.exitcode == 0 and not worker.in_hand:
            return
        names, ended = sorted(worker.in_hand), _ended(worker.process)
        self._deaths.update(names)
        if not names or max(self._deaths[name] for name in names) >= MAX_DEATHS:
            doing = f"while it had {', '.join(names)} in hand, twice" if names else "before it took a unit"
            raise WorkerDied(
                f"a process that scores {ended} {doing}. The parts that were written stay; the same command goes on "
                "from there. Killed processes are mostly out of memory: try fewer --processes, or a smaller --batch."
            )
        log.warning("process ended by itself; its units begin anew", ended=ended, units=names)
        self._left += reversed(worker.in_hand.values())
        self.hire()


def _ended(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _work(start: Start, asks: Connection, tells: Connection, number: int) -> None:
    """The whole life of a process."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    configure_log(wanted=lambda level: level == "error" or not number)  # what the model's start says is the same in all
    try:
        with terminable():
            for each in measured(start().run(_asked(asks))):
                tells.send(each)
    except (EdgewardError, OSError) as error:
        _tell(tells, error)
    except Exception:
        _tell(tells, RuntimeError(f"in a process that scores:\n{traceback.format_exc()}"))


def _asked(asks: Connection) -> Iterator[Unit]:
    """Units from the parent, until there is none, or no parent."""
    with suppress(EOFError, OSError):
        while True:
            asks.send_bytes(b"?")
            unit = asks.recv()
            if unit is None:
                return
            yield unit


def _tell(tells: Connection, error: Exception) -> None:
    with suppress(OSError):  # the parent has gone
        tells.send(error)


def _follow_parent() -> None:
    """Nobody would hear of a unit that is written after the parent was killed."""
    parent = parent_process()
    assert parent is not None  # this is a spawned process
    wait([parent.sentinel])
    os._exit(1)
