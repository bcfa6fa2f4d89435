"""Runs requests: each as soon as an instance is free, several in one run where that is allowed.

A request has one owner at any moment: the queue, or the one thread that took it out under the lock. Only its owner
calls `done`, and always outside the lock; that is why it is called exactly once.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bundle.errors import BadInput
from bundle.log import log
from serve.batch import Run, Runs, run_alone, run_batch
from serve.errors import Cancelled, Closed, DeadlineExceeded, QueueFull, TimedOut
from serve.pace import SHORT_NS, Pace
from serve.queue import Job, Outcome, Policy, Queue
from serve.statistics import Reason, Statistics

HAND_OVER_NS = 100_000  # to another thread and back: 45 to 65 µs measured, more when others want the interpreter

_REASONS: dict[type[Exception], Reason] = {
    Closed: "rejected",
    TimedOut: "timeout",
    DeadlineExceeded: "deadline",
    Cancelled: "cancelled",
    BadInput: "bad_input",
}


class _Turn(NamedTuple):
    batch: Sequence[Job]
    run: Run
    taken: int  # instances


class Scheduler:
    """The queue of one version of a model, and the threads that run what is in it.

    The threads start with the first job, sleep while there is nothing to do, and end when the scheduler is closed.
    """

    def __init__(self, model: Runs, policy: Policy, statistics: Statistics) -> None:
        self._model = model
        self._policy = policy
        self._statistics = statistics
        self._pace = Pace()
        self._queue = Queue(model.name, policy)
        self._lock = threading.Lock()  # guards the queue and all that follows
        self._work = threading.Condition(self._lock)  # a job came, an instance became free, or it was closed
        self._alarm = threading.Condition(self._lock)  # a job came that expires before the watcher wakes
        self._ended = threading.Condition(self._lock)  # no job is left
        self._started = False
        self._closed = False
        self._busy = 0  # instances
        self._open = 0  # jobs whose `done` has not returned
        self._wakes = -math.inf  # when the watcher wakes by itself; -inf: it is awake, and will look at all jobs
        self._order: deque[Job] = deque()  # with preserve_order: the jobs whose `done` has not been called
        self._outcomes: dict[Job, Outcome] = {}  # of those that wait for an earlier one's
        self._telling = False  # whether a thread calls `done` in order

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that were taken out of the queue and have not been told their outcome."""
        with self._lock:
            return self._open - len(self._queue)

    def submit(self, job: Job) -> None:
        """Queue a job; `done` gets its outcome, and may get it before this returns.

        Raises:
            QueueFull: too many wait.
            Closed: the model is being unloaded. This is not counted, as its successor may take the job.
            BadInput: there is no such priority.
        """
        job.times.queued = time.perf_counter_ns()
        level = self._level(job) if self._policy.levels else 0
        try:
            with self._lock:
                if self._closed:
                    raise self._closing()
                self._start()
                job.alone = not self._busy and not self._queue
                self._queue.add(job, level, self._policy.instances - self._busy)
                self._expect(job)
                if self._busy < self._policy.instances:
                    self._work.notify()
                if job.expires < self._wakes:
                    self._alarm.notify()
        except QueueFull:
            self._statistics.failed("rejected", 0)
            raise

    def try_inline(self, job: Job, step_aside: Callable[[bool], bool]) -> bool:
        """Run a job in this thread, when nothing waits and an instance is free; else do nothing.

        Args:
            job: that was not submitted.
            step_aside: asked first, with whether the run is likely to take less time than to hand it to another
                thread; with False it is not run.

        Returns:
            Whether it was run. `done` was called then; with preserve_order it is called after those that came before.

        Raises:
            BadInput: there is no such priority.
        """
        job.times.queued = job.times.started = time.perf_counter_ns()
        if self._policy.levels:
            self._level(job)
        short = self._pace.expect_ns(job.size) < HAND_OVER_NS
        with self._lock:
            if self._closed or self._queue or self._busy >= self._policy.instances or self._queue.joins(job):
                return False
            if not step_aside(short):
                return False
            job.alone = not self._busy
            turn = self._turn([job])
            self._expect(job)
        self._execute(turn)
        return True

    def cancel(self, job: Job) -> None:
        """Drop a job that still waits: `done` gets Cancelled. One that runs, or has ended, is left alone."""
        with self._lock:
            if not job.waits:
                return
            self._queue.remove(job)
        self._finish(job, Cancelled("the request was cancelled while it waited; nothing was run."))

    def close(self, drain_s: float) -> bool:
        """Take no more jobs, run those that wait, end the threads.

        Args:
            drain_s: how long that may take. Those that still wait then get Closed, those that run go on.

        Returns:
            Whether all jobs had ended in time.
        """
        with self._lock:
            self._closed = True
            self._work.notify_all()  # nothing waits for others any more
            ended = self._ended.wait_for(lambda: not self._open, min(drain_s, threading.TIMEOUT_MAX))
            left = self._queue.clear()
            self._work.notify_all()
            self._alarm.notify_all()
        for job in left:
            self._finish(job, self._closing())
        return ended

    def _level(self, job: Job) -> int:
        try:
            return self._queue.level(job)
        except BadInput:
            self._statistics.failed("bad_input", 0)
            raise

    def _closing(self) -> Closed:
        return Closed(f"model {self._model.name!r} is being unloaded, or the server is stopping.")

    def _expect(self, job: Job) -> None:
        self._open += 1
        if self._policy.preserve_order:
            self._order.append(job)

    def _start(self) -> None:
        if self._started:
            return
        for _ in range(self._policy.instances):
            threading.Thread(target=_repeat, args=(self._run,), name=f"run-{self._model.name}", daemon=True).start()
        threading.Thread(target=_repeat, args=(self._watch,), name=f"watch-{self._model.name}", daemon=True).start()
        self._started = True

    def _watch(self) -> bool:
        """Drop what has expired, or sleep until the next may have; False when there is nothing left to watch."""
        with self._lock:
            dropped = self._queue.expire()
            if not dropped:
                if self._closed and not self._queue:
                    return False
                self._wakes = self._queue.expires
                self._alarm.wait(min(self._wakes - time.monotonic(), threading.TIMEOUT_MAX))
                self._wakes = -math.inf
        for job, error in dropped:
            self._finish(job, error)
        return True

    def _run(self) -> bool:
        """Wait for a batch and run it; False when there will be none, as it is closed and nothing waits."""
        with self._lock:
            turn, wait_s = self._ready()
            while not turn:
                if self._closed and not self._queue:
                    return False
                self._work.wait(wait_s)
                turn, wait_s = self._ready()
        self._execute(turn)
        return True

    def _ready(self) -> tuple[_Turn | None, float | None]:
        """What is to run now, taken out; or nothing, and how long to wait unless something changes."""
        if not self._queue or self._busy >= self._policy.instances:
            return None, None
        batch = self._queue.batch()
        if self._policy.joins_short and self._pace.expect_ns(batch[0].size) > SHORT_NS:
            batch = batch[:1]
        wait_s = 0.0 if self._closed else self._queue.delay_s(batch)
        if wait_s > 0:
            return None, min(wait_s, threading.TIMEOUT_MAX)
        now = time.perf_counter_ns()
        for job in batch:
            self._queue.remove(job)
            job.times.started = now
        turn = self._turn(batch)
        if self._queue:
            self._work.notify()  # another runner may be free for what is left
        return turn, None

    def _turn(self, batch: Sequence[Job]) -> _Turn:
        """What was taken out of the queue, and the instances that it takes from now on."""
        alone = batch[0].alone and not (self._busy or self._queue)
        beside = self._model.beside() if self._policy.splits and not alone else None
        taken = self._policy.instances if self._policy.splits and not beside else 1
        self._busy += taken
        return _Turn(batch, beside or self._model.run, taken)

    def _execute(self, turn: _Turn) -> None:
        if len(turn.batch) == 1:
            (job,) = turn.batch
            outcome = run_alone(self._model, turn.run, job, self._policy.sizes, self._statistics)
            if job.times.ran:
                self._pace.saw(job.size, job.times.ended - job.times.started)
            self._free(turn.taken)  # who is told may ask again at once, and then has no company
            self._finish(job, outcome)
        else:
            for job, outcome in run_batch(self._model, turn.run, turn.batch, self._policy.sizes, self._statistics):
                self._finish(job, outcome)
            self._free(turn.taken)

    def _free(self, taken: int) -> None:
        with self._lock:
            self._busy -= taken
            if self._queue:
                self._work.notify()

    def _finish(self, job: Job, outcome: Outcome) -> None:
        """Tell a job its outcome; with preserve_order after those that came before it, whoever runs them."""
        if isinstance(outcome, Exception):
            job.times.ended = time.perf_counter_ns()
            self._statistics.failed(_reason(outcome), job.times.ended - job.times.queued)
        if not self._policy.preserve_order:
            self._tell(job, outcome)
            return
        with self._lock:
            self._outcomes[job] = outcome
            if self._telling:
                return  # that thread will see it
            self._telling = True
        while (told := self._next_told()) is not None:
            self._tell(*told)

    def _next_told(self) -> tuple[Job, Outcome] | None:
        with self._lock:
            if self._order and self._order[0] in self._outcomes:
                job = self._order.popleft()
                return job, self._outcomes.pop(job)
            self._telling = False
            return None

    def _tell(self, job: Job, outcome: Outcome) -> None:
        try:
            job.done(outcome)
        except Exception as error:  # the caller's fault, for which neither the thread nor a neighbour is to pay
            log.error("outcome lost", model=self._model.name, exc_info=error)
        with self._lock:
            self._open -= 1
            if self._closed and not self._open:
                self._ended.notify_all()


def _reason(error: Exception) -> Reason:
    return next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), "error")


def _repeat(turn: Callable[[], bool]) -> None:
    """Call until it says False; what a turn holds of requests ends with its frame, not with the next request."""
    while turn():
        pass
