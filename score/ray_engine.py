"""The engine of a Ray cluster: it gets the units, not their rows.

Each actor reads, scores and writes whole units by the same runner as the processes of one machine, and gives Ray a
report of each. So Ray schedules and tries again, the parts are the same files, and either engine goes on where the
other was stopped. A unit that Ray runs twice has one part: both write the same bytes, and the name is taken whole.
"""

import logging
import os
import pickle
import socket
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from queue import SimpleQueue
from typing import Any

from bundle.errors import DataError, EdgewardError, MissingExtra
from score.config import ScoreConfig
from score.errors import WorkerDied
from score.runner import UnitRunner
from score.units import Plan, Unit, UnitReport
from score.usage import measured

MAX_ATTEMPTS = 4  # at a unit whose actor, or its machine, is lost; Ray itself would try for ever
MAX_TOGETHER = 4  # units that an actor is given at once
_REACH_S = 10.0  # until somebody answers
_STORE_BYTES = 100 << 20  # of the shared memory of a local Ray, which holds units and reports alone
_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: all ports on loopback, as Ray has it on these two
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what a later version does, without the warning
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # it takes the arguments of every actor of Ray Data for a fault
}


def reports(config: ScoreConfig, plan: Plan, units: Sequence[Unit]) -> Generator[UnitReport, None, None]:
    """Score units on Ray and yield a report as each is written, in no particular order.

    Args:
        config: names the cluster. Bundle, inputs and output have the same paths on all of its machines.
        plan: with settings: an actor takes `threads` CPUs; there are `processes` of them where Ray is started here,
            and elsewhere as many as find room.
        units: what is left to do.

    Raises:
        MissingExtra: Ray is not installed.
        WorkerDied: the process or the machine that scored a unit was lost, MAX_ATTEMPTS times.
        EdgewardError, OSError: an actor raised it.
    """
    if not units:
        return
    assert plan.settings is not None  # they are chosen before any unit is scored
    with connected(config.ray_address, cpus=plan.settings.processes * plan.settings.threads) as ray:
        yield from _run(ray, config, plan, units)


@contextmanager
def connected(address: str | None, *, cpus: int) -> Iterator[Any]:
    """The module `ray`, connected; where it was already, it stays so.

    Args:
        address: of a running cluster; None starts one on this machine that only this machine can reach.
        cpus: of the one that is started.

    Raises:
        DataError: nothing answers at the address.
        MissingExtra: Ray is not installed.
    """
    check(address)
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        ray.init("local", num_cpus=cpus, object_store_memory=_STORE_BYTES, include_dashboard=False, **quiet)
    else:
        ray.init(address, **quiet)
    with redirect_stdout(sys.stderr):  # Ray tells of lost workers on stdout, which is the result's
        try:
            yield ray
        finally:
            ray.shutdown()


def check(address: str | None) -> None:
    """Refuse, before anything is planned, what could not be scored; see connected."""
    if address is None:
        os.environ.update(_LOCAL)  # it is read by the import
    else:
        _check_address(address)
    _import_ray()


def _check_address(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), _REACH_S).close()
        except (OSError, OverflowError) as error:
            raise DataError(f"no Ray answers at --ray-address {address}: {error}. Nothing was scored.") from error


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra(
            f"--engine ray needs Ray Data ({error}); nothing was scored. Install edgeward with its extra 'ray'."
        ) from error
    return ray


def _run(ray: Any, config: ScoreConfig, plan: Plan, units: Sequence[Unit]) -> Iterator[UnitReport]:
    assert plan.settings is not None
    _quieten(ray)
    cpus = plan.settings.threads
    room = max(1, sum(int(node["Resources"].get("CPU", 0) // cpus) for node in ray.nodes() if node["Alive"]))
    attempts = ray.remote(num_cpus=0)(_Attempts).remote()
    told = ray.data.from_items(
        [unit.name for unit in units], override_num_blocks=_blocks(len(units), room)
    ).map_batches(
        _Actor,
        fn_constructor_args=(config, plan, attempts),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=min(room, len(units)), max_size=len(units)),
        num_cpus=cpus,
        num_gpus=0 if config.device in ("auto", "cpu") else 1,
    )
    for row in told.iter_rows():
        yield _heard(row["told"])


def _quieten(ray: Any) -> None:
    """The caller shows the progress."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def _blocks(units: int, room: int) -> int:
    """Into how many parts Ray cuts the list: an actor reads ahead within one, but the last one should not be long."""
    together = min(MAX_TOGETHER, units // (8 * room))
    return units // max(1, together)


class _Attempts:
    """Counts, in an actor of its own, how often units were begun."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        self._begun[name] += 1
        return self._begun[name]


class _Actor:
    """A process of Ray. It loads the model with the first unit, and keeps it."""

    def __init__(self, config: ScoreConfig, plan: Plan, attempts: Any) -> None:
        self._config = config
        self._plan = plan
        self._attempts = attempts
        self._units = {unit.name: unit for unit in plan.units}
        self._queue: SimpleQueue[Unit | None] = SimpleQueue()
        self._reports: Iterator[UnitReport] | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        """Names of units -> their reports, or the error that ends the run, pickled."""
        names = [str(name) for name in batch["item"]]
        try:
            self._begin(names)
            for name in names:
                self._queue.put(self._units[name])
            for _ in names:
                yield {"told": [pickle.dumps(next(self._running()))]}
        except (EdgewardError, OSError) as error:
            yield {"told": [pickle.dumps(error)]}

    def _begin(self, names: list[str]) -> None:
        attempt = _import_ray().get(self._attempts.begin.remote(names[0]))
        if attempt > MAX_ATTEMPTS:
            raise WorkerDied(
                f"Ray lost {MAX_ATTEMPTS} times what had {', '.join(names)} in hand. The parts that were written stay; "
                "the same command goes on from there, on Ray or without. Killed processes are mostly out of memory: "
                "try a smaller --batch."
            )

    def _running(self) -> Iterator[UnitReport]:
        if self._reports is None:
            runner = UnitRunner(self._config, self._plan)
            self._reports = measured(runner.run(iter(self._queue.get, None)))
        return self._reports


def _heard(told: bytes) -> UnitReport:
    report: UnitReport | Exception = pickle.loads(told)
    if isinstance(report, Exception):
        raise report
    return report
