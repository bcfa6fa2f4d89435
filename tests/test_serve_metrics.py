import threading
from dataclasses import dataclass
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.admission import Traffic
from serve.client import Client
from serve.config import ServeConfig
from serve.index import IndexEntry
from serve.loading import Served
from serve.metrics import Metrics
from serve.queue import Job, Policy
from serve.scheduler import Scheduler
from serve.server import start
from serve.statistics import Statistics
from tests.serve_bundles import identity

TRITON = {
    "nv_inference_request_success": "counter",
    "nv_inference_request_failure": "counter",
    "nv_inference_count": "counter",
    "nv_inference_exec_count": "counter",
    "nv_inference_request_duration_us": "counter",
    "nv_inference_queue_duration_us": "counter",
    "nv_inference_compute_input_duration_us": "counter",
    "nv_inference_compute_infer_duration_us": "counter",
    "nv_inference_compute_output_duration_us": "counter",
    "nv_inference_pending_request_count": "gauge",
    "nv_model_load_duration_secs": "gauge",
}


@dataclass
class Repository:
    """Versions of models that are served, and what else is in the index."""

    served: list[Served]
    entries: tuple[IndexEntry, ...] = ()

    def __iter__(self):
        return iter(self.served)

    def index(self):
        return self.entries


class Waits:
    """A model whose run waits until it may go on."""

    name = "slow"

    def __init__(self):
        self.started, self.go = threading.Event(), threading.Event()

    def decode(self, arrays):
        return arrays

    def run(self, decoded, size):
        self.started.set()
        assert self.go.wait(60)
        return decoded

    def encode(self, result):
        return result


def served(name="mood", version=3, model=None, statistics=None):
    statistics = statistics or Statistics()
    scheduler = Scheduler(model or Waits(), Policy(), statistics)
    return Served(SimpleNamespace(name=name, version=version), scheduler, statistics, 1.5, print)


def samples(metrics):
    """Every sample of the text by name and labels; this parser, not the server, renames Triton's counters."""
    return {
        (family.name if family.name.startswith("nv_") else sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def of(name, **labels):
    return (name, *sorted({"model": "mood", "version": "3", **labels}.items()))


@pytest.fixture
def counted():
    """Two runs that succeeded, one of two requests, and three requests that failed."""
    statistics = Statistics()
    statistics.ran(
        rows=[2, 3], queue_ns=[0, 5_000_000], decode_ns=100_000, run_ns=3_000_000, encode_ns=50_000,
        total_ns=[3_150_000, 8_150_000],
    )  # fmt: skip
    statistics.ran(rows=[1], queue_ns=[0], decode_ns=0, run_ns=9_000_000_000, encode_ns=0, total_ns=[9_000_000_000])
    for reason in ("rejected", "timeout", "bad_input"):
        statistics.failed(reason, 1000)
    return samples(Metrics(Repository([served(statistics=statistics)])))


def test_stages_are_cumulative_histograms_in_seconds(counted):
    """What Prometheus needs for quantiles: buckets that include those below them, a sum, a count."""

    def bucket(stage, le):
        return counted[of("edgeward_request_seconds_bucket", stage=stage, le=le)]

    assert [bucket("run", le) for le in ("0.002", "0.005", "5", "+Inf")] == [0, 2, 2, 3]
    assert [bucket("queue", le) for le in ("1e-05", "0.002", "0.005", "+Inf")] == [2, 2, 3, 3]
    assert counted[of("edgeward_request_seconds_count", stage="total")] == 3
    assert counted[of("edgeward_request_seconds_sum", stage="run")] == pytest.approx(9.006)


def test_batches_are_counted_in_rows(counted):
    """One observation for each run."""
    assert counted[of("edgeward_batch_rows_bucket", le="1")] == 1
    assert counted[of("edgeward_batch_rows_bucket", le="4")] == 1
    assert counted[of("edgeward_batch_rows_bucket", le="8")] == 2
    assert counted[of("edgeward_batch_rows_sum")] == 6


def test_failures_are_counted_by_reason(counted):
    """Every reason is there from the start, so that its first failure is seen as an increase."""
    reasons = ("rejected", "timeout", "deadline", "cancelled", "bad_input", "error")
    assert [counted[of("edgeward_failures_total", reason=reason)] for reason in reasons] == [1, 1, 0, 0, 1, 0]


def test_tritons_names_hold_what_tritons_users_expect(counted):
    """Requests, rows and runs are told apart; durations are sums over requests in microseconds."""
    expected = {
        of("nv_inference_request_success"): 3,
        of("nv_inference_count"): 6,
        of("nv_inference_exec_count"): 2,
        of("nv_inference_request_duration_us"): 9_011_300,
        of("nv_inference_queue_duration_us"): 5_000,
        of("nv_inference_compute_input_duration_us"): 200,
        of("nv_inference_compute_infer_duration_us"): 9_006_000,
        of("nv_inference_compute_output_duration_us"): 100,
        of("nv_inference_pending_request_count"): 0,
        of("nv_model_load_duration_secs"): 1.5,
        of("nv_inference_request_failure", reason="REJECTED"): 2,
        of("nv_inference_request_failure", reason="CANCELED"): 0,
        of("nv_inference_request_failure", reason="BACKEND"): 0,
        of("nv_inference_request_failure", reason="OTHER"): 1,
    }
    assert {key: counted.get(key) for key in expected} == expected


def test_tritons_names_have_tritons_types():
    """Readers that take a sample by its family's type find it: counters are not renamed to end in _total."""
    lines = Metrics(Repository([served()])).text().decode().splitlines()
    assert 'nv_inference_count{model="mood",version="3"} 0.0' in lines
    types = dict(line.split()[2:] for line in lines if line.startswith("# TYPE nv_"))

    assert {name: types.get(name) for name in TRITON} == TRITON
    assert not [name for name in types if name.endswith("_total")]


def test_requests_that_wait_and_run_are_told_apart():
    """While one request runs and two wait, /metrics says so; afterwards there are none."""
    model, done = Waits(), threading.Semaphore(0)
    each = served("slow", 1, model)
    metrics = Metrics(Repository([each]))
    for _ in range(3):
        each.scheduler.submit(Job({"x": np.zeros(1)}, 1, None, lambda outcome: done.release()))
    assert model.started.wait(60)
    busy = samples(metrics)
    model.go.set()
    assert all(done.acquire(timeout=60) for _ in range(3))
    assert each.scheduler.close(60)
    idle = samples(metrics)

    labels = {"model": "slow", "version": "1"}
    names = ("edgeward_requests_running", "edgeward_requests_waiting", "nv_inference_pending_request_count")
    assert [busy[of(name, **labels)] for name in names] == [1, 2, 2]
    assert [idle[of(name, **labels)] for name in names] == [0, 0, 0]
    assert idle[of("nv_inference_request_success", **labels)] == 3


def test_versions_that_are_not_served_or_were_refused_are_seen():
    """A version that was refused is told from one that a client unloaded, also while its old files are served."""
    entries = {
        IndexEntry("mood", "3", "READY"): (1, 0),
        IndexEntry("mood", "4", "READY", "its hash is wrong"): (1, 1),
        IndexEntry("mood", "5", "UNAVAILABLE", "its gate failed"): (0, 1),
        IndexEntry("mood", "6", "UNAVAILABLE", "unloaded"): (0, 0),
        IndexEntry("mood", "", "LOADING"): (0, 0),
    }
    found = samples(Metrics(Repository([], tuple(entries))))

    for entry, expected in entries.items():
        states = [found[of(f"edgeward_model_{state}", version=entry.version)] for state in ("ready", "refused")]
        assert tuple(states) == expected, entry


def test_what_only_the_transport_knows_is_asked_at_every_scrape():
    """Bytes and calls in flight, streams, and calls that were refused before they reached a model."""
    traffic = iter([Traffic(requests=2, bytes=1000, streams=1, refused={"bytes": 5, "streams": 0}), Traffic()])
    metrics = Metrics(Repository([]), lambda: next(traffic))
    before, after = samples(metrics), samples(metrics)

    names = ("edgeward_calls_in_flight", "edgeward_bytes_in_flight", "edgeward_streams")
    assert [before[name,] for name in names] == [2, 1000, 1]
    assert before["edgeward_refused_calls_total", ("reason", "bytes")] == 5
    assert [after[name,] for name in names] == [0, 0, 0]


def test_the_process_and_the_machine_are_seen():
    """RSS, open files and CPU of the process under Prometheus' own names, the machine's memory under Triton's."""
    found = samples(Metrics(Repository([])))

    assert 0 < found["process_resident_memory_bytes",] < found["nv_cpu_memory_total_bytes",]
    assert 0 < found["nv_cpu_memory_used_bytes",] < found["nv_cpu_memory_total_bytes",]
    assert found["process_open_fds",] > 0
    assert found["process_cpu_seconds_total",] > 0


def test_any_name_of_a_model_is_a_label():
    """Quotes, newlines and letters of any script come through."""
    name = 'mood "best"\n\\ – 好'
    found = samples(Metrics(Repository([], (IndexEntry(name, "3", "READY"),))))

    assert found[of("edgeward_model_ready", model=name)] == 1


def test_a_running_server_shows_what_it_answered(tmp_path):
    """A call over gRPC is in the next scrape over HTTP, and the port goes with the server."""
    (tmp_path / "same.onnx").write_bytes(identity(np.float32, [2]))
    server = start(ServeConfig((tmp_path / "same.onnx",), port=0, http_port=0, device="cpu"))
    address = f"http://127.0.0.1:{server.http_port}"
    try:
        with Client(server.address) as client:
            client.infer("same", {"x": np.zeros(2, np.float32)})
        with urlopen(f"{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        with urlopen(f"{address}/readyz", timeout=10) as answer:
            assert answer.status == 200
    finally:
        server.stop()

    assert 'nv_inference_request_success{model="same",version="1"} 1.0' in text
    assert 'edgeward_request_seconds_count{model="same",stage="total",version="1"} 1.0' in text
    assert "edgeward_bytes_in_flight 0.0" in text
    with pytest.raises(URLError):
        urlopen(f"{address}/livez", timeout=10)
