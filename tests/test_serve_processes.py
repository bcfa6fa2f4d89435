"""Several servers on one port: started as a command, ended by signals, by one of them, or by the first one's end."""

import gc
import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve.config import ServeConfig
from serve.repository import open_repository
from tests.serve_bundles import counter

PATIENCE_S = 60
STEPS = 2_000_000  # of a call that is under way when something else happens
ENDLESS = 1_000_000_000

LOADING = """
import os
import threading
from pathlib import Path

from bundle.log import log
from serve.config import ServeConfig
from serve.processes import serve_many

def load(config):
    log.info("loading", pid=os.getpid())
    threading.Event().wait()

if __name__ == "__main__":
    serve_many(ServeConfig((Path("none"),), port=0, processes=2), load)
"""


@pytest.fixture
def slow(tmp_path):
    path = tmp_path / "slow.onnx"
    path.write_bytes(counter())
    return path


@contextmanager
def running(*command):
    """A first process and its servers; whatever is left of them at the end is killed."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def two_servers(path, *options):
    several = ("--processes", "2", "--instances", "2")
    return running("-m", "edgeward", "serve", path, "--port", "0", "--device", "cpu", *several, *options)


def told(process, event, times=2):
    """The lines with an event, as soon as there are so many of them."""
    lines = []
    for line in process.stderr:
        if f'"event": "{event}"' in line:
            lines.append(json.loads(line))
        if len(lines) == times:
            return lines
    raise AssertionError(f"{event!r} came {len(lines)} times")


def rest(process):
    """The lines that are left; they end when the last of the processes has."""
    return process.communicate(timeout=PATIENCE_S)[1].splitlines()


def events(lines):
    return [json.loads(line)["event"] for line in lines if line.startswith("{")]


@contextmanager
def calling(address):
    """A connection of its own, which one of the servers gets."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def count_to(steps):
    request = pb.ModelInferRequest(model_name="slow", raw_input_contents=[np.int64(steps).tobytes()])
    request.inputs.add(name="n", datatype="INT64")
    return request


def under_way(stub, steps):
    """A call that its server has begun: a later one on the same connection has been answered."""
    call = stub.ModelInfer.future(count_to(steps), timeout=PATIENCE_S)
    for _ in range(50):
        stub.ModelInfer(count_to(0), timeout=PATIENCE_S)
    assert not call.done()
    return call


def answered(ready):
    """How many runs a server tells of."""
    with urllib.request.urlopen(f"http://127.0.0.1:{ready['http_port']}/metrics", timeout=PATIENCE_S) as metrics:
        lines = metrics.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("nv_inference_exec_count{"))


def test_two_servers_share_a_port_and_drain_together(slow):
    """Each answers some of the connections; at SIGTERM the calls that run are answered, and the command ends with 0."""
    with two_servers(slow, "--http-port", "0") as process:
        first, second = told(process, "ready")
        assert first["address"] == second["address"]
        while not (answered(first) and answered(second)):
            with calling(first["address"]) as stub:
                assert stub.ModelInfer(count_to(3), timeout=PATIENCE_S).raw_output_contents == [np.int64(3).tobytes()]
        with calling(first["address"]) as stub:
            call = under_way(stub, STEPS)
            process.terminate()
            assert call.result().raw_output_contents == [np.int64(STEPS).tobytes()]
        assert events(rest(process)).count("stopped") == 2
        assert process.returncode == 0


def test_servers_drain_when_the_first_process_is_gone(slow):
    """Else they would answer beside those that are started anew; what runs is answered."""
    with two_servers(slow) as process:
        with calling(told(process, "ready")[0]["address"]) as stub:
            call = under_way(stub, STEPS)
            process.kill()
            assert call.result().raw_output_contents == [np.int64(STEPS).tobytes()]
        assert events(rest(process)).count("stopped") == 2


def test_a_second_signal_ends_all_at_once(slow):
    """Whoever cannot wait for the drain need not look for the servers."""
    with two_servers(slow, "--drain-s", "3600") as process:
        with calling(told(process, "ready")[0]["address"]) as stub:
            under_way(stub, ENDLESS)
            process.terminate()
            told(process, "draining")
            process.terminate()
            rest(process)
        assert process.returncode == 128 + signal.SIGTERM


def test_what_cannot_be_served_is_one_line(tmp_path):
    """As of a single server: the reason, and no traceback."""
    with two_servers(tmp_path / "none.onnx") as process:
        lines = [line for line in rest(process) if not line.startswith("{")]
        assert process.returncode == 1
    assert len(lines) == 1
    assert lines[0].startswith("edgeward: ")
    assert "none.onnx" in lines[0]


@pytest.fixture
def loading(tmp_path):
    program = tmp_path / "loading.py"
    program.write_text(LOADING)
    return program


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_they_are_ready_is_the_exit_code(loading, number):
    """As of a single server: who waits for it can tell that it never served."""
    with running(loading) as process:
        told(process, "loading")
        process.send_signal(number)
        rest(process)
        assert process.returncode == 128 + number


def test_one_that_ends_by_itself_ends_all(loading):
    """Whoever supervises the first process starts all anew."""
    with running(loading) as process:
        os.kill(told(process, "loading")[1]["pid"], signal.SIGKILL)
        lines = rest(process)
    assert process.returncode == 1
    assert "StartError: a process ended by itself, and the others were stopped" in lines[-1]


def test_what_is_there_at_the_start_is_not_collected(slow):
    """The garbage collector of a server goes through what came since, not through its models and modules."""
    gc.unfreeze()

    open_repository(ServeConfig((slow,), device="cpu", threads=1)).close(0)

    assert gc.get_freeze_count() > 10_000
    gc.unfreeze()
