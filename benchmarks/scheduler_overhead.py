"""What the scheduler costs a request: python -m benchmarks.scheduler_overhead

Microseconds a request of a model that does next to nothing: called in a loop, run inline by the scheduler, queued for
its thread, and given to concurrent.futures.ThreadPoolExecutor, which has no deadlines, batches or counts. The sides
run in turns, there and back; printed are medians, and the median of the ratios to the executor, turn by turn.
"""

import argparse
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np

from serve.scheduler import Job, Policy, Scheduler
from serve.statistics import Statistics

ARRAYS = {"x": np.zeros(1, np.float32)}

Done = Callable[[Any], object]
Side = Callable[[Done], object]


class Identity:
    """The smallest model there is."""

    name = "identity"

    def decode(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The inputs."""
        return arrays

    def run(self, decoded: Sequence[Any], size: int | None) -> Sequence[Any]:
        """The inputs."""
        return decoded

    def encode(self, result: Any) -> dict[str, np.ndarray]:
        """The inputs."""
        return dict(result)


def microseconds(side: Side, requests: int, in_flight: int) -> float:
    """Of one request, with so many under way."""
    slots = threading.Semaphore(in_flight)
    start = time.perf_counter()
    for _ in range(requests):
        slots.acquire()
        side(lambda outcome: slots.release())
    for _ in range(in_flight):
        slots.acquire()
    return (time.perf_counter() - start) / requests * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="of each side in each turn (default 5000)")
    parser.add_argument("--turns", type=int, default=10, help="(default 10)")
    options = parser.parse_args()
    model, executor = Identity(), ThreadPoolExecutor(1)
    plain = Scheduler(model, Policy(), Statistics())
    batching = Scheduler(model, Policy(max_batch=16), Statistics())

    def call() -> dict[str, np.ndarray]:
        return model.encode(model.run([model.decode(ARRAYS)], None)[0])

    def job(done: Done, deadline: float | None = None) -> Job:
        return Job(ARRAYS, 1, "any", done, deadline=deadline)

    sides: dict[str, Side] = {
        "executor": lambda done: executor.submit(call).add_done_callback(done),
        "bare call": lambda done: done(call()),
        "inline": lambda done: plain.try_inline(job(done)),
        "scheduler": lambda done: plain.submit(job(done)),
        "scheduler, deadlines": lambda done: plain.submit(job(done, time.monotonic() + 60)),
        "scheduler, batches of 16": lambda done: batching.submit(job(done)),
    }
    for in_flight in (1, 16, 128):
        measured: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.turns):
            for name in list(sides) if turn % 2 == 0 else reversed(sides):
                measured[name].append(microseconds(sides[name], options.requests, in_flight))
        print(f"{in_flight} in flight:")
        for name, values in measured.items():
            ratio = median(value / other for value, other in zip(values, measured["executor"], strict=True))
            print(f"  {name:26}{median(values):7.1f} µs  {ratio:5.2f} × executor")
    executor.shutdown()
    plain.close(1)
    batching.close(1)


if __name__ == "__main__":
    main()
