"""What became of the requests to one version of a model: counts, durations, histograms.

The counts are Triton's (its statistics extension), so that perf_analyzer can read them: a request counts once in every
stage and lasts as long as the run that it was part of; an execution is one run, however many requests it joined.
"""

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from protos import inference_pb2 as pb

Stage = Literal["queue", "decode", "run", "encode", "total"]
Reason = Literal["rejected", "timeout", "deadline", "cancelled", "bad_input", "error"]

_BOUNDS_NS = tuple(digit * 10**power for power in range(4, 10) for digit in (1, 2, 5))  # 10 µs to 5 s
_AT_ONCE = 256  # runs that are counted together: between two calls, each would take thrice as long
_BOUNDS_ROWS = tuple(2**power for power in range(11))  # 1 to 1024


@dataclass(frozen=True)
class Histogram:
    """Durations in nanoseconds, or batch sizes in rows.

    Attributes:
        bounds: the upper ends of the buckets, inclusive.
        counts: one for each bucket, not cumulative, and a last one for what is beyond the last bound.
        sum: of all values.
    """

    bounds: tuple[int, ...]
    counts: tuple[int, ...]
    sum: int

    @property
    def count(self) -> int:
        """Values."""
        return sum(self.counts)


@dataclass(frozen=True)
class BatchCounts:
    """The runs of one batch size; nanoseconds are sums over runs."""

    count: int
    decode_ns: int
    run_ns: int
    encode_ns: int


@dataclass(frozen=True)
class Snapshot:
    """All counts at one moment.

    Attributes:
        stages: durations of the requests that ran; "total", from their arrival in the queue to their outcome, is of
            those alone that succeeded.
        batches: by rows, without padding.
        failures: requests by reason, all reasons.
        failed_ns: how long the failed requests took, from their arrival, together.
        last_inference_ms: the end of the last run, in milliseconds since 1970; 0 when there was none.
    """

    stages: Mapping[Stage, Histogram]
    batches: Mapping[int, BatchCounts]
    failures: Mapping[Reason, int]
    failed_ns: int
    last_inference_ms: int

    @property
    def requests(self) -> int:
        """Requests that succeeded."""
        return self.stages["total"].count

    @property
    def failed(self) -> int:
        """Requests that did not."""
        return sum(self.failures.values())

    @property
    def rows(self) -> int:
        """Rows of the requests that ran."""
        return sum(rows * runs.count for rows, runs in self.batches.items())

    @property
    def runs(self) -> int:
        """Runs that succeeded."""
        return sum(runs.count for runs in self.batches.values())

    @property
    def batch_rows(self) -> Histogram:
        """Rows of each run."""
        counts = [0] * (len(_BOUNDS_ROWS) + 1)
        for rows, runs in self.batches.items():
            counts[bisect_left(_BOUNDS_ROWS, rows)] += runs.count
        return Histogram(_BOUNDS_ROWS, tuple(counts), self.rows)


class _Ran(NamedTuple):
    rows: Sequence[int]
    queue_ns: Sequence[int]
    decode_ns: int
    run_ns: int
    encode_ns: int
    total_ns: Sequence[int]
    ended_ns: int  # since 1970


class Statistics:
    """Counts since a version was loaded; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all but what is not counted yet
        self._uncounted: deque[_Ran] = deque()
        self._counts = {stage: [0] * (len(_BOUNDS_NS) + 1) for stage in get_args(Stage)}
        self._ns = dict.fromkeys(get_args(Stage), 0)
        self._batches: dict[int, list[int]] = {}
        self._failures: dict[Reason, int] = dict.fromkeys(get_args(Reason), 0)
        self._failed_ns = 0
        self._last_inference_ms = 0

    def ran(
        self,
        *,
        rows: Sequence[int],
        queue_ns: Sequence[int],
        decode_ns: int,
        run_ns: int,
        encode_ns: int,
        total_ns: Sequence[int],
    ) -> None:
        """Count one run and the requests that it answered.

        Args:
            rows: of each request.
            queue_ns: from its arrival to its start, of each request.
            decode_ns: of all requests together, as every one of them waited for all.
            run_ns: of the run.
            encode_ns: of all requests together.
            total_ns: from its arrival to its outcome, of each request.
        """
        self._uncounted.append(_Ran(rows, queue_ns, decode_ns, run_ns, encode_ns, total_ns, time.time_ns()))
        if len(self._uncounted) >= _AT_ONCE:
            with self._lock:
                self._count()

    def _count(self) -> None:
        while self._uncounted:
            ran = self._uncounted.popleft()
            requests = len(ran.rows)
            for queued, total in zip(ran.queue_ns, ran.total_ns, strict=True):
                self._observe("queue", queued, 1)
                self._observe("total", total, 1)
            self._observe("decode", ran.decode_ns, requests)
            self._observe("run", ran.run_ns, requests)
            self._observe("encode", ran.encode_ns, requests)
            runs = self._batches.setdefault(sum(ran.rows), [0, 0, 0, 0])
            runs[0] += 1
            runs[1] += ran.decode_ns
            runs[2] += ran.run_ns
            runs[3] += ran.encode_ns
            self._last_inference_ms = max(self._last_inference_ms, ran.ended_ns // 1_000_000)

    def _observe(self, stage: Stage, ns: int, requests: int) -> None:
        self._counts[stage][bisect_left(_BOUNDS_NS, ns)] += requests
        self._ns[stage] += ns * requests

    def failed(self, reason: Reason, total_ns: int) -> None:
        """Count one request that got no answer, and how long it took to say so."""
        with self._lock:
            self._failures[reason] += 1
            self._failed_ns += total_ns

    def unwritten(self, reason: Reason, total_ns: int) -> None:
        """Count one request as failed that ran, and whose answer could not be written.

        Args:
            reason: why not.
            total_ns: as `ran` was told.
        """
        with self._lock:
            self._count()  # also its run, which was counted before
            self._observe("total", total_ns, -1)
            self._failures[reason] += 1
            self._failed_ns += total_ns

    def snapshot(self) -> Snapshot:
        """All counts, of one moment."""
        with self._lock:
            self._count()
            return Snapshot(
                {
                    stage: Histogram(_BOUNDS_NS, tuple(counts), self._ns[stage])
                    for stage, counts in self._counts.items()
                },
                {rows: BatchCounts(*runs) for rows, runs in sorted(self._batches.items())},
                dict(self._failures),
                self._failed_ns,
                self._last_inference_ms,
            )


def as_message(name: str, version: int, snapshot: Snapshot) -> pb.ModelStatistics:
    """The counts as Triton's clients know them."""
    stages = snapshot.stages
    return pb.ModelStatistics(
        name=name,
        version=str(version),
        last_inference=snapshot.last_inference_ms,
        inference_count=snapshot.rows,
        execution_count=snapshot.runs,
        inference_stats=pb.InferStatistics(
            success=_requests(stages["total"]),
            fail=_duration(snapshot.failed, snapshot.failed_ns),
            queue=_requests(stages["queue"]),
            compute_input=_requests(stages["decode"]),
            compute_infer=_requests(stages["run"]),
            compute_output=_requests(stages["encode"]),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=rows,
                compute_input=_duration(runs.count, runs.decode_ns),
                compute_infer=_duration(runs.count, runs.run_ns),
                compute_output=_duration(runs.count, runs.encode_ns),
            )
            for rows, runs in snapshot.batches.items()
        ],
    )


def _requests(histogram: Histogram) -> pb.StatisticDuration:
    return _duration(histogram.count, histogram.sum)


def _duration(count: int, ns: int) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count, ns=ns)
