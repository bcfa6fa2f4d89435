"""The requests that wait for one version of a model: in which order they run, with whom, and for how long they wait."""

import math
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, pairwise
from operator import attrgetter

import numpy as np

from bundle.errors import BadInput, EdgewardError
from serve.errors import DeadlineExceeded, QueueFull, TimedOut

Outcome = Mapping[str, np.ndarray] | Exception
"""The outputs of a request by name, or why there are none."""


@dataclass(frozen=True)
class Policy:
    """How the requests to one version of a model are queued, joined and run."""

    max_batch: int = 1
    """Rows of one run that are joined from several requests; 1: every request runs alone."""
    max_delay_s: float = 0.0
    """How long the oldest request of a batch may wait for others to join, while an instance is free."""
    sizes: tuple[int, ...] = ()
    """Rows that a run is padded to, ascending; a run with more rows is not padded."""
    preferred: tuple[int, ...] = ()
    """A batch of at least the smallest of these rows waits no longer."""
    max_queue: int = 256
    """Requests that wait, beyond those that free instances are about to take; with levels, on each level."""
    instances: int = 1
    """Runs at the same time."""
    joins_short: bool = False
    """Requests are joined only where each by itself is likely to take less time than pace.SHORT_NS."""
    splits: bool = False
    """A request that comes while there is no other runs with all threads, and takes all instances; others run with one
    thread each, side by side."""
    levels: int = 0
    """Of priority, 1 the highest; 0: all requests are equal, whatever they ask for."""
    default_level: int = 0
    """Of requests that ask for none; with levels, one of them."""
    timeout_s: float | None = None
    """How long a request may wait in the queue; None or 0: for ever."""
    timeout_override: bool = True
    """Whether a request's own timeout counts, too; the shorter one holds."""
    delays_timed_out: bool = False
    """What has timed out is not refused, but runs after all others of its level that have not."""
    preserve_order: bool = False
    """Outcomes are told in the order in which the requests came."""
    by_level: Mapping[int, "Policy"] = field(default_factory=dict)
    """Of single levels: max_queue, timeout_s, timeout_override and delays_timed_out, all else is not read."""

    def of(self, level: int) -> "Policy":
        """What holds for the queue of one level."""
        return self.by_level.get(level, self)


@dataclass(slots=True)
class Times:
    """When a request reached each stage, in time.perf_counter_ns(); 0: it never did.

    From queued to started it waits, to decoded its batch is decoded, to ran it runs, to ended its batch is encoded.
    """

    queued: int = 0
    started: int = 0
    decoded: int = 0
    ran: int = 0
    ended: int = 0

    def stages(self) -> dict[str, tuple[int, int]]:
        """When each stage that the request went through began and ended."""
        stamps = (self.queued, self.started, self.decoded, self.ran, self.ended)
        names = ("queue", "decode", "run", "encode")
        spans = zip(names, pairwise(stamps), strict=True)
        return {name: (start, end) for name, (start, end) in spans if start and end}


@dataclass(eq=False, slots=True)
class Job:
    """One request."""

    arrays: Mapping[str, np.ndarray]
    """Every input."""
    rows: int
    """1 where there is no batch axis."""
    key: Hashable
    """Jobs of one key may be run together; None: never joined, and never padded."""
    done: Callable[[Outcome], None]
    """Called exactly once, from any thread."""
    level: int = 0
    """Priority; 0: the default."""
    timeout_s: float | None = None
    """How long it may wait in the queue; None or 0: as long as the policy says."""
    deadline: float | None = None
    """In time.monotonic(); it is dropped when this has passed before the run."""
    size: int = 0
    """Bytes of the request."""
    times: Times = field(default_factory=Times)

    alone: bool = field(default=False, init=False)  # there was no other when it came
    waits: bool = field(default=False, init=False)
    rank: tuple[int, bool, int] = field(default=(0, False, 0), init=False)  # level, whether it timed out, number
    expires: float = field(default=math.inf, init=False)  # the next of its timeout and its deadline


_rank = attrgetter("rank")
_expiry = attrgetter("expires", "rank")


class Queue:
    """Jobs by priority and arrival; the scheduler's lock guards it."""

    def __init__(self, name: str, policy: Policy) -> None:
        self._name = name
        self._policy = policy
        self._jobs: list[Job] = []  # in the order in which they run
        self._mortal: list[Job] = []  # those that can expire, in the order in which they do
        self._lengths: Counter[int] = Counter()  # by level
        self._numbers = count()
        self._enough = min((policy.max_batch, *policy.preferred))

    def __len__(self) -> int:
        return len(self._jobs)

    def level(self, job: Job) -> int:
        """The level that a job is on.

        Raises:
            BadInput: there is no such level.
        """
        if not self._policy.levels:
            return 0
        level = job.level or self._policy.default_level
        if not 1 <= level <= self._policy.levels:
            raise BadInput(f"priority is {level}; expected 1 (the highest) to {self._policy.levels}, or 0.")
        return level

    def add(self, job: Job, level: int, free: int) -> None:
        """Let a job wait behind the others of its level.

        Args:
            job: it waits nowhere.
            level: of priority.
            free: instances that are about to take a job each.

        Raises:
            QueueFull: as many wait as may.
        """
        policy = self._policy.of(level)
        if self._lengths[level] >= policy.max_queue + free:
            raise QueueFull(
                f"Exceeds maximum queue size: {policy.max_queue} requests wait for model {self._name!r}. "
                "Try again later."
            )
        job.rank = (level, False, next(self._numbers))
        job.expires = min(time.monotonic() + _timeout_s(policy, job), _deadline(job))
        self._insert(job)

    def _insert(self, job: Job) -> None:
        job.waits = True
        self._lengths[job.rank[0]] += 1
        insort(self._jobs, job, key=_rank)
        if job.expires < math.inf:
            insort(self._mortal, job, key=_expiry)

    def remove(self, job: Job) -> None:
        """Take out a job that waits."""
        job.waits = False
        self._lengths[job.rank[0]] -= 1
        del self._jobs[bisect_left(self._jobs, job.rank, key=_rank)]
        if job.expires < math.inf:
            del self._mortal[bisect_left(self._mortal, (job.expires, job.rank), key=_expiry)]

    def clear(self) -> list[Job]:
        """Take out all jobs."""
        jobs = list(self._jobs)
        for job in reversed(jobs):
            self.remove(job)
        return jobs

    @property
    def expires(self) -> float:
        """When the next job expires, in time.monotonic()."""
        return self._mortal[0].expires if self._mortal else math.inf

    def expire(self) -> list[tuple[Job, EdgewardError]]:
        """Take out the jobs whose time is over, and put those behind that are only to be delayed."""
        dropped: list[tuple[Job, EdgewardError]] = []
        if not self._mortal:
            return dropped
        now = time.monotonic()
        while self.expires <= now:
            job = self._mortal[0]
            self.remove(job)
            waited = f"{(time.perf_counter_ns() - job.times.queued) / 1e9:.3g} s in the queue of model {self._name!r}"
            if _deadline(job) <= now:
                dropped.append((job, DeadlineExceeded(f"the deadline passed after {waited}; nothing was run.")))
            elif self._policy.of(job.rank[0]).delays_timed_out:
                job.rank, job.expires = (job.rank[0], True, job.rank[2]), _deadline(job)
                self._insert(job)
            else:
                dropped.append((job, TimedOut(f"Request timeout expired after {waited}; nothing was run.")))
        return dropped

    def batch(self) -> list[Job]:
        """The first job, and in their order all others that fit into a run with it. They still wait; one has to."""
        first = self._jobs[0]
        batch, rows = [first], first.rows
        if first.key is None:
            return batch
        for job in islice(self._jobs, 1, None):
            if rows >= self._policy.max_batch:
                break
            if job.key == first.key and rows + job.rows <= self._policy.max_batch:
                batch.append(job)
                rows += job.rows
        return batch

    def delay_s(self, batch: Sequence[Job]) -> float:
        """How long a batch may go on waiting for others to join.

        Not at all when it is full, when others wait that cannot join it, or when one of its jobs would expire.
        """
        if not self.joins(batch[0]) or len(batch) < len(self._jobs) or sum(job.rows for job in batch) >= self._enough:
            return 0.0
        age_s = (time.perf_counter_ns() - min(job.times.queued for job in batch)) / 1e9
        left_s = self._policy.max_delay_s - age_s
        return left_s if self.expires > time.monotonic() + left_s else 0.0

    def joins(self, job: Job) -> bool:
        """Whether a job waits for others to join it, when nothing else waits."""
        return self._policy.max_delay_s > 0 and job.key is not None and job.rows < self._enough


def _timeout_s(policy: Policy, job: Job) -> float:
    own = job.timeout_s if policy.timeout_override else None
    return min(policy.timeout_s or math.inf, own or math.inf)


def _deadline(job: Job) -> float:
    return math.inf if job.deadline is None else job.deadline
