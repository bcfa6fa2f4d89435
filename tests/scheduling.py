"""A model and requests for the tests of the scheduler."""

import threading
from concurrent.futures import Future

import numpy as np

from bundle.errors import BadInput
from serve.queue import Job

PATIENCE_S = 30  # after which a test has failed; none waits for that long


class Doubler:
    """Doubles; what is below zero cannot be decoded, the run fails with a 13 and the encoder with a 26."""

    name = "doubler"

    def __init__(self, *, blocked=False):
        self.blocked = blocked
        self.runs = []
        self.sizes = []
        self.threads = []
        self.entered = threading.Semaphore(0)
        self._gate = threading.Semaphore(0)

    def decode(self, arrays):
        value = int(arrays["x"][0])
        if value < 0:
            raise BadInput(f"{value} is below 0")
        return value

    def run(self, decoded, size):
        self.runs.append(list(decoded))
        self.sizes.append(size)
        self.threads.append(threading.current_thread())
        self.entered.release()
        if self.blocked:
            assert self._gate.acquire(timeout=PATIENCE_S)
        if 13 in decoded:
            raise RuntimeError("13")
        return [2 * value for value in decoded]

    def encode(self, result):
        if result == 52:
            raise RuntimeError("52")
        return {"y": np.array([result])}

    def await_run(self):
        """Return when one more run has begun."""
        assert self.entered.acquire(timeout=PATIENCE_S)

    def let_go(self):
        """Let all runs end, now and from now on."""
        self.blocked = False
        self._gate.release(1000)


class Asked:
    """A job and its outcome."""

    def __init__(self, value, *, rows=1, key="any", **options):
        self.outcome = Future()
        self.job = Job({"x": np.full(rows, value)}, rows, key, self.outcome.set_result, **options)

    def by(self, scheduler):
        scheduler.submit(self.job)
        return self

    def answer(self):
        outcome = self.outcome.result(PATIENCE_S)
        if isinstance(outcome, Exception):
            raise outcome
        return int(outcome["y"][0])
