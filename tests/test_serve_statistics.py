import threading
import time
import uuid

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from serve import inference
from serve.config import ServeConfig
from serve.server import start
from serve.shared_memory import FOLDER
from serve.statistics import Statistics, as_message
from tests.serve_bundles import identity

MS = 1_000_000
INPUTS = [pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[4])]


@pytest.fixture
def statistics():
    """Two runs, one of two requests and one of one, and two requests that failed."""
    statistics = Statistics()
    statistics.ran(
        rows=[1, 3], queue_ns=[2 * MS, MS], decode_ns=10, run_ns=5 * MS, encode_ns=20, total_ns=[8 * MS, 7 * MS]
    )
    statistics.ran(rows=[4], queue_ns=[0], decode_ns=1, run_ns=3 * MS, encode_ns=2, total_ns=[4 * MS])
    statistics.failed("timeout", 9 * MS)
    statistics.failed("rejected", 0)
    return statistics


def test_requests_rows_and_runs_are_counted_apart(statistics):
    """Three requests of eight rows in two runs; failures are none of them."""
    snapshot = statistics.snapshot()

    assert (snapshot.requests, snapshot.rows, snapshot.runs, snapshot.failed) == (3, 8, 2, 2)
    assert snapshot.failures == {
        "rejected": 1,
        "timeout": 1,
        "deadline": 0,
        "cancelled": 0,
        "bad_input": 0,
        "error": 0,
    }
    assert snapshot.failed_ns == 9 * MS


def test_every_request_of_a_run_lasts_as_long_as_the_run(statistics):
    """Decoding, running and encoding count once a request with the time of all; queue and total are its own."""
    stages = statistics.snapshot().stages

    assert {name: (stage.count, stage.sum) for name, stage in stages.items()} == {
        "queue": (3, 3 * MS),
        "decode": (3, 21),
        "run": (3, 13 * MS),
        "encode": (3, 42),
        "total": (3, 19 * MS),
    }


def test_a_request_whose_answer_cannot_be_written_has_failed(statistics):
    """It ran, and its run is counted as before."""
    statistics.unwritten("bad_input", 7 * MS)
    snapshot = statistics.snapshot()

    assert (snapshot.requests, snapshot.rows, snapshot.runs, snapshot.failed) == (2, 8, 2, 3)
    assert snapshot.stages["total"].sum == 12 * MS
    assert (snapshot.failures["bad_input"], snapshot.failed_ns) == (1, 16 * MS)
    assert snapshot.stages["run"].count == 3


@pytest.fixture
def server(tmp_path):
    (tmp_path / "echo.onnx").write_bytes(identity(np.float32, [None]))
    server = start(ServeConfig((tmp_path / "echo.onnx",), port=0, device="cpu", threads=1, shared_memory=True))
    yield server
    server.stop(drain_s=0)


def into_region(size):
    request = pb.ModelInferRequest(model_name="echo", inputs=INPUTS, raw_input_contents=[bytes(16)])
    to = request.outputs.add(name="y").parameters
    to["shared_memory_region"].string_param = "r"
    to["shared_memory_byte_size"].int64_param = size
    return request


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs /dev/shm")
def test_of_shared_memory_what_is_not_there_or_too_small_is_a_bad_request(server, stub):
    """Whether that is seen before the run or after it."""
    path = FOLDER / f"edgeward-test-{uuid.uuid4().hex}"
    path.write_bytes(bytes(16))
    for size in (16, 4):
        with pytest.raises(grpc.RpcError, match="Unable to find"):
            stub.ModelInfer(into_region(size))
    stub.SystemSharedMemoryRegister(
        pb.SystemSharedMemoryRegisterRequest(name="r", key=f"/{path.name}", offset=0, byte_size=16)
    )
    path.unlink()
    with pytest.raises(grpc.RpcError, match="does not fit"):
        stub.ModelInfer(into_region(4))
    stub.ModelInfer(into_region(16))

    snapshot = server._repository.find("echo", "").statistics.snapshot()
    assert (snapshot.requests, snapshot.failed, snapshot.runs) == (1, 3, 2)
    assert snapshot.failures["bad_input"] == 3


@pytest.mark.parametrize("part", ["read_inputs", "write_answer"])
def test_a_fault_of_the_server_is_an_error_of_its_own(server, stub, monkeypatch, part):
    """Not of the client, who did nothing wrong."""

    def broken(*arguments, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(inference, part, broken)
    with pytest.raises(grpc.RpcError, match="internal error"):
        stub.ModelInfer(pb.ModelInferRequest(model_name="echo", inputs=INPUTS, raw_input_contents=[bytes(16)]))

    snapshot = server._repository.find("echo", "").statistics.snapshot()
    assert (snapshot.requests, snapshot.failed, snapshot.failures["error"]) == (0, 1, 1)


@pytest.mark.parametrize(
    ("ns", "bucket"), [(0, 0), (10_000, 0), (10_001, 1), (20_000, 1), (5 * 10**9, 17), (10**12, 18)]
)
def test_a_bound_belongs_to_its_bucket(ns, bucket):
    """Buckets are from 10 µs to 5 s in steps of 1, 2, 5, upper bounds inclusive; the last has none."""
    statistics = Statistics()
    statistics.ran(rows=[1], queue_ns=[ns], decode_ns=0, run_ns=0, encode_ns=0, total_ns=[ns])

    queue = statistics.snapshot().stages["queue"]

    assert queue.bounds[:4] == (10_000, 20_000, 50_000, 100_000)
    assert queue.counts == tuple(int(index == bucket) for index in range(len(queue.bounds) + 1))


def test_batch_sizes_are_rows_of_runs(statistics):
    """Two runs of four rows; a run beyond the largest bound is counted in the last bucket."""
    statistics.ran(rows=[2000], queue_ns=[0], decode_ns=0, run_ns=0, encode_ns=0, total_ns=[0])

    rows = statistics.snapshot().batch_rows

    assert dict(zip((*rows.bounds, None), rows.counts, strict=True)) == {
        **dict.fromkeys(rows.bounds, 0),
        4: 2,
        None: 1,
    }
    assert (rows.count, rows.sum) == (3, 2008)


def test_the_message_counts_as_triton_does(statistics):
    """perf_analyzer divides the nanoseconds of each stage by its count of requests, and rows by executions."""
    before_ms = time.time_ns() // MS
    message = as_message("digits", 3, statistics.snapshot())
    stats = message.inference_stats

    assert (message.name, message.version) == ("digits", "3")
    assert 0 <= before_ms - message.last_inference < 60_000
    assert (message.inference_count, message.execution_count) == (8, 2)
    assert (stats.success.count, stats.success.ns) == (3, 19 * MS)
    assert (stats.fail.count, stats.fail.ns) == (2, 9 * MS)
    assert (stats.queue.count, stats.queue.ns) == (3, 3 * MS)
    assert (stats.compute_input.count, stats.compute_input.ns) == (3, 21)
    assert (stats.compute_infer.count, stats.compute_infer.ns) == (3, 13 * MS)
    assert (stats.compute_output.count, stats.compute_output.ns) == (3, 42)
    assert (stats.cache_hit.count, stats.cache_miss.count) == (0, 0)


def test_batch_statistics_add_up(statistics):
    """By batch size, runs and their own times: together all executions, and all rows."""
    statistics.ran(rows=[1], queue_ns=[0], decode_ns=7, run_ns=8, encode_ns=9, total_ns=[30])

    message = as_message("digits", 3, statistics.snapshot())

    assert [(batch.batch_size, batch.compute_infer.count, batch.compute_infer.ns) for batch in message.batch_stats] == [
        (1, 1, 8),
        (4, 2, 8 * MS),
    ]
    assert [(batch.compute_input.ns, batch.compute_output.ns) for batch in message.batch_stats] == [(7, 9), (11, 22)]
    assert sum(batch.compute_input.count for batch in message.batch_stats) == message.execution_count
    assert (
        sum(batch.batch_size * batch.compute_output.count for batch in message.batch_stats) == message.inference_count
    )


def test_a_version_that_nobody_called_has_counts_of_zero():
    """The message is complete before the first request: clients subtract one from a later one."""
    message = as_message("digits", 1, Statistics().snapshot())

    assert (message.last_inference, message.inference_count, len(message.batch_stats)) == (0, 0, 0)
    assert message.inference_stats.HasField("queue")


def test_a_snapshot_stays_as_it_is(statistics):
    """What is counted later does not change it."""
    snapshot = statistics.snapshot()
    statistics.ran(rows=[1], queue_ns=[0], decode_ns=0, run_ns=0, encode_ns=0, total_ns=[0])
    statistics.failed("error", 1)

    assert (snapshot.requests, snapshot.rows, snapshot.failed) == (3, 8, 2)


def test_no_count_is_lost_between_threads():
    """Four threads count at the same time, and a snapshot never shows a part of a run."""
    statistics = Statistics()

    def count():
        for _ in range(500):
            statistics.ran(rows=[1, 2], queue_ns=[1, 1], decode_ns=1, run_ns=1, encode_ns=1, total_ns=[1, 1])
            statistics.failed("error", 1)
            snapshot = statistics.snapshot()
            torn.append(snapshot.rows != 3 * snapshot.runs or snapshot.requests != 2 * snapshot.runs)

    torn = []
    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not any(torn)
    snapshot = statistics.snapshot()
    assert (snapshot.requests, snapshot.runs, snapshot.failed_ns) == (4000, 2000, 2000)
