"""One batch, from its inputs to its outcomes: decode each request, run all together, encode each answer."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bundle.log import log
from serve.errors import DeadlineExceeded
from serve.queue import Job, Outcome
from serve.statistics import Statistics

Run = Callable[[Sequence[Any], int | None], Sequence[Any]]


class Runs(Protocol):
    """What can be run: a served model."""

    @property
    def name(self) -> str:
        """Of the model."""

    def decode(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """One request, made ready for `run`. Raises BadInput, and then only this request fails."""

    def run(self, decoded: Sequence[Any], size: int | None) -> Sequence[Any]:
        """One run for all requests, padded to `size` rows. Returns one result for each request."""

    def encode(self, result: Any) -> Mapping[str, np.ndarray]:
        """The outputs of one request."""

    def beside(self) -> Run | None:
        """As `run`, but with one thread; None while that cannot be had. Asked for only where the policy splits."""


@dataclass(slots=True)
class _Request:
    job: Job
    decoded: Any
    decode_ns: int


def run_batch(
    model: Runs, run: Run, jobs: Sequence[Job], sizes: Sequence[int], statistics: Statistics
) -> Iterator[tuple[Job, Outcome]]:
    """Each job once, with its outputs or with what went wrong, as soon as that is known.

    A run that fails with several requests is repeated with each alone, so that nobody fails for a neighbour.

    Args:
        model: whose they are.
        run: its own, or beside.
        jobs: of one key.
        sizes: rows to pad to, ascending.
        statistics: counts those that succeed, before they are yielded; the others are left to the caller.
    """
    requests = []
    for job in jobs:
        start = time.perf_counter_ns()
        try:
            decoded = model.decode(job.arrays)
        except Exception as error:
            yield job, error
        else:
            requests.append(_Request(job, decoded, time.perf_counter_ns() - start))
    yield from _run(model, run, requests, sizes, statistics)


def run_alone(model: Runs, run: Run, job: Job, sizes: Sequence[int], statistics: Statistics) -> Outcome:
    """As `run_batch` of one job, in a third of the time."""
    times, begin = job.times, time.perf_counter_ns()
    try:
        decoded = model.decode(job.arrays)
        if job.deadline is not None and job.deadline <= time.monotonic():
            raise _late()
        size = next((size for size in sizes if size >= job.rows), None) if sizes and job.key is not None else None
        start = time.perf_counter_ns()
        results = run([decoded], size)
        assert len(results) == 1, f"{len(results)} results for 1 requests"
        ran = time.perf_counter_ns()
        outputs = model.encode(results[0])
    except Exception as error:
        return error
    times.decoded, times.ran, times.ended = start, ran, time.perf_counter_ns()
    statistics.ran(
        rows=(job.rows,),
        queue_ns=(times.started - times.queued,),
        decode_ns=start - begin,
        run_ns=ran - start,
        encode_ns=times.ended - ran,
        total_ns=(times.ended - times.queued,),
    )
    return outputs


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the model ran; nothing was run.")


def _run(
    model: Runs, run: Run, requests: Sequence[_Request], sizes: Sequence[int], statistics: Statistics
) -> Iterator[tuple[Job, Outcome]]:
    now = time.monotonic()
    in_time = []
    for request in requests:
        if request.job.deadline is not None and request.job.deadline <= now:
            yield request.job, _late()
        else:
            in_time.append(request)
    if not in_time:
        return
    start = time.perf_counter_ns()
    try:
        results = run([request.decoded for request in in_time], _size(in_time, sizes))
        assert len(results) == len(in_time), f"{len(results)} results for {len(in_time)} requests"
    except Exception as error:
        if len(in_time) == 1:
            yield in_time[0].job, error
            return
        log.warning("batch failed, run one by one", model=model.name, requests=len(in_time), error=repr(error))
    else:
        yield from _encode(model, in_time, results, start, statistics)
        return
    for request in in_time:
        yield from _run(model, run, [request], sizes, statistics)


def _size(requests: Sequence[_Request], sizes: Sequence[int]) -> int | None:
    if requests[0].job.key is None:
        return None
    rows = sum(request.job.rows for request in requests)
    return next((size for size in sizes if size >= rows), None)


def _encode(
    model: Runs, requests: Sequence[_Request], results: Sequence[Any], start: int, statistics: Statistics
) -> Iterator[tuple[Job, Outcome]]:
    ran = time.perf_counter_ns()
    encoded: list[tuple[_Request, Outcome]] = []
    for request, result in zip(requests, results, strict=True):
        try:
            encoded.append((request, model.encode(result)))
        except Exception as error:
            yield request.job, error
    ended = time.perf_counter_ns()
    for request, _ in encoded:
        times = request.job.times
        times.decoded, times.ran, times.ended = start, ran, ended
    if encoded:
        _count([request for request, _ in encoded], statistics)
    for request, outputs in encoded:
        yield request.job, outputs


def _count(requests: Sequence[_Request], statistics: Statistics) -> None:
    times = [request.job.times for request in requests]
    statistics.ran(
        rows=[request.job.rows for request in requests],
        queue_ns=[each.started - each.queued for each in times],
        decode_ns=sum(request.decode_ns for request in requests),
        run_ns=times[0].ran - times[0].decoded,
        encode_ns=times[0].ended - times[0].ran,
        total_ns=[each.ended - each.queued for each in times],
    )
