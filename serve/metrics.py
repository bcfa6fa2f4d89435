"""What /metrics shows: made when it is asked for, from the counts that are kept anyway; no request pays for it.

Beside our own names stand Triton's, so that dashboards and alerts that were made for it go on working. They count the
same things; docs/operations.md says what each of them holds.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.admission import Traffic
from serve.index import IndexEntry
from serve.loading import Served
from serve.repository import Repository
from serve.statistics import Histogram, Reason, Snapshot, Stage

_MODEL = ("model", "version")
_TRITON_REASONS: dict[Reason, str] = {
    "rejected": "REJECTED",
    "timeout": "REJECTED",
    "deadline": "CANCELED",
    "cancelled": "CANCELED",
    "error": "BACKEND",
    "bad_input": "OTHER",
}
_TRITON_STAGES: tuple[tuple[Stage, str], ...] = (
    ("total", "nv_inference_request_duration_us"),
    ("queue", "nv_inference_queue_duration_us"),
    ("decode", "nv_inference_compute_input_duration_us"),
    ("run", "nv_inference_compute_infer_duration_us"),
    ("encode", "nv_inference_compute_output_duration_us"),
)
_SUFFIX = re.compile(rb"^(# (?:HELP|TYPE) nv_\w+)_total(?= )", re.MULTILINE)  # Triton's counters have none

_Labels = tuple[str, str]  # of _MODEL
_Counted = Sequence[tuple[_Labels, Served, Snapshot]]


class Metrics:
    """The metrics of one server."""

    def __init__(self, repository: Repository, traffic: Callable[[], Traffic] = Traffic) -> None:
        """Nothing is counted here.

        Args:
            repository: whose models are shown.
            traffic: called at every scrape.
        """
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(repository, traffic))
        ProcessCollector(registry=self._registry)  # RSS, CPU seconds, open files; nothing where there is no /proc

    def text(self) -> bytes:
        """The metrics of this moment, in Prometheus' text format 0.0.4."""
        return _SUFFIX.sub(rb"\1", generate_latest(self._registry))


class _Collector(Collector):
    def __init__(self, repository: Repository, traffic: Callable[[], Traffic]) -> None:
        self._repository = repository
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        counted = [
            ((served.model.name, str(served.model.version)), served, served.statistics.snapshot())
            for served in self._repository
        ]
        yield from _ours(counted)
        yield from _triton(counted)
        yield from _states(self._repository.index())
        yield from _transport(self._traffic())
        yield from _memory()
        yield _gauge("edgeward_info", "Always 1.", [((version("edgeward"),), 1)], ("release",))


def _states(index: Iterable[IndexEntry]) -> Iterator[Metric]:
    entries = [((entry.name, entry.version), entry) for entry in index]
    ready = [(labels, entry.state == "READY") for labels, entry in entries]
    refused = [(labels, entry.reason not in ("", "unloaded")) for labels, entry in entries]
    yield _gauge("edgeward_model_ready", "1 where the version is served, else 0.", ready)
    yield _gauge(
        "edgeward_model_refused", "1 where its newest files were refused, whether older ones are served.", refused
    )


def _ours(counted: _Counted) -> Iterator[Metric]:
    stages = HistogramMetricFamily(
        "edgeward_request_seconds",
        "How long answered requests took in each stage; a request lasts as long as the run that it is part of.",
        labels=(*_MODEL, "stage"),
    )
    rows = HistogramMetricFamily("edgeward_batch_rows", "Rows of each run, without padding.", labels=_MODEL)
    failures = CounterMetricFamily(
        "edgeward_failures", "Requests that got no answer, by reason.", labels=(*_MODEL, "reason")
    )
    for labels, _, snapshot in counted:
        for stage, histogram in snapshot.stages.items():
            stages.add_metric((*labels, stage), *_buckets(histogram, 1e-9))
        rows.add_metric(labels, *_buckets(snapshot.batch_rows, 1))
        for reason, count in snapshot.failures.items():
            failures.add_metric((*labels, reason), count)
    yield from (stages, rows, failures)
    waiting = [(labels, served.scheduler.pending) for labels, served, _ in counted]
    running = [(labels, served.scheduler.running) for labels, served, _ in counted]
    loaded = [(labels, served.loaded_s) for labels, served, _ in counted]
    yield _gauge("edgeward_requests_waiting", "Requests in the queue.", waiting)
    yield _gauge("edgeward_requests_running", "Requests that are decoded, run or encoded.", running)
    yield _gauge("edgeward_model_load_seconds", "How long loading, self-test and warm-up took.", loaded)


def _buckets(histogram: Histogram, unit: float) -> tuple[list[tuple[str, float]], float]:
    """Prometheus' cumulative buckets and the sum, both in the histogram's unit times `unit`."""
    ends = [f"{bound * unit:.6g}" for bound in histogram.bounds] + ["+Inf"]
    return list(zip(ends, accumulate(histogram.counts), strict=True)), histogram.sum * unit


def _triton(counted: _Counted) -> Iterator[Metric]:
    counters: list[tuple[str, str, Callable[[Snapshot], int]]] = [
        ("nv_inference_request_success", "Requests that were answered.", lambda snapshot: snapshot.requests),
        ("nv_inference_count", "Rows of the requests that were answered.", lambda snapshot: snapshot.rows),
        ("nv_inference_exec_count", "Runs.", lambda snapshot: snapshot.runs),
        *((name, f"Microseconds in stage {stage}.", partial(_microseconds, stage)) for stage, name in _TRITON_STAGES),
    ]
    for name, text, value in counters:
        family = Metric(name, text, "counter")
        for labels, _, snapshot in counted:
            family.add_sample(name, dict(zip(_MODEL, labels, strict=True)), value(snapshot))
        yield family
    yield _triton_failures(counted)
    pending = [(labels, served.scheduler.pending) for labels, served, _ in counted]
    loaded = [(labels, served.loaded_s) for labels, served, _ in counted]
    yield _gauge("nv_inference_pending_request_count", "Requests in the queue.", pending)
    yield _gauge("nv_model_load_duration_secs", "How long loading took, in seconds.", loaded)


def _microseconds(stage: Stage, snapshot: Snapshot) -> int:
    return snapshot.stages[stage].sum // 1000


def _triton_failures(counted: _Counted) -> Metric:
    family = Metric("nv_inference_request_failure", "Requests that got no answer, by Triton's reasons.", "counter")
    for (model, number), _, snapshot in counted:
        counts = dict.fromkeys(_TRITON_REASONS.values(), 0)
        for reason in get_args(Reason):
            counts[_TRITON_REASONS[reason]] += snapshot.failures[reason]
        for reason, count in counts.items():
            family.add_sample(family.name, {"model": model, "version": number, "reason": reason}, count)
    return family


def _transport(traffic: Traffic) -> Iterator[Metric]:
    yield _gauge("edgeward_calls_in_flight", "Requests for inference in work.", [((), traffic.requests)], ())
    yield _gauge("edgeward_bytes_in_flight", "Bytes of their messages.", [((), traffic.bytes)], ())
    yield _gauge("edgeward_streams", "Streams that are open.", [((), traffic.streams)], ())
    refused = CounterMetricFamily("edgeward_refused_calls", "Calls that never reached a model.", labels=("reason",))
    for reason, count in traffic.refused.items():
        refused.add_metric((reason,), count)
    yield refused


def _memory() -> Iterator[Metric]:
    """The machine's memory, as Triton tells it; nothing where there is no /proc."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return
    yield _gauge("nv_cpu_memory_total_bytes", "Memory of the machine.", [((), total)], ())
    yield _gauge("nv_cpu_memory_used_bytes", "Memory of the machine that is in use.", [((), total - free)], ())


def _gauge(
    name: str, text: str, values: Iterable[tuple[Sequence[str], float]], labels: Sequence[str] = _MODEL
) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for each, value in values:
        family.add_metric(each, value)
    return family
