"""The server as a process: signals, ports, health while it drains, and what it never imports."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve.client import Client
from serve.config import ServeConfig
from serve.envelope import parse_request
from serve.errors import NotReady, ServerError, StartError
from serve.repository import open_repository
from serve.server import start
from serve.service import Service, status
from serve.shared_memory import Regions
from tests.serve_bundles import counter, identity, write_text_bundle
from tests.server_process import address_in, run_server, wait_for


@pytest.fixture
def slow(tmp_path):
    path = tmp_path / "slow.onnx"
    path.write_bytes(counter())
    return path


def count_to(steps):
    request = pb.ModelInferRequest(model_name="slow", raw_input_contents=[np.int64(steps).tobytes()])
    request.inputs.add(name="n", datatype="INT64")
    return request


def running_call(stub, steps):
    """A call that the server has begun: later calls on the same connection have been answered."""
    running = stub.ModelInfer.future(count_to(steps))
    for _ in range(50):
        stub.ModelInfer(count_to(0))
    assert not running.done()
    return running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_call_end_and_takes_no_new_one(slow, number):
    """The call that runs is answered, new ones get UNAVAILABLE, readiness is false, and the process ends with 0."""
    with run_server(slow, instances=2) as process:
        address = address_in(wait_for(process, '"event": "ready"'))
        with grpc.insecure_channel(address) as channel, Client(address) as client:
            assert client.ready()
            running = running_call(inference_pb2_grpc.GRPCInferenceServiceStub(channel), 2_000_000)
            process.send_signal(number)
            wait_for(process, '"event": "draining"')
            while client.ready():
                pass
            with pytest.raises(ServerError) as refused:
                client.infer("slow", {"n": np.array(0)})
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
            assert running.result().raw_output_contents[0] == np.int64(2_000_000).tobytes()
        wait_for(process, '"event": "stopped"')
        assert process.wait() == 0


def test_a_second_signal_ends_the_process_at_once(slow):
    """Whoever cannot wait for the drain need not send SIGKILL."""
    with run_server(slow, instances=2) as process:
        with grpc.insecure_channel(address_in(wait_for(process, '"event": "ready"'))) as channel:
            running_call(inference_pb2_grpc.GRPCInferenceServiceStub(channel), 1_000_000_000)
            process.terminate()
            wait_for(process, '"event": "draining"')
            process.terminate()
        assert process.wait() == 128 + signal.SIGTERM


def test_calls_that_outlast_the_drain_are_cut_off(slow):
    """After drain_s the client is told, not left waiting."""
    server = start(ServeConfig(paths=(slow,), port=0, device="cpu", threads=1, instances=2))
    with grpc.insecure_channel(server.address) as channel:
        running = running_call(inference_pb2_grpc.GRPCInferenceServiceStub(channel), 1_000_000)
        server.stop(drain_s=0)
        assert running.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


def test_health_is_not_serving_while_the_server_drains(slow):
    """Who watches hears it before the socket closes."""
    server = start(ServeConfig(paths=(slow,), port=0, device="cpu", threads=1, instances=2))
    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor() as pool:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="slow"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stopped = pool.submit(server.stop)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stopped.result()


def test_a_taken_port_is_one_clear_error(tmp_path):
    """The address is named, and another port is suggested."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(StartError, match=rf"127\.0\.0\.1:{port} cannot be bound"):
            start(ServeConfig(paths=(path,), port=port, device="cpu", threads=1))


def test_two_servers_never_share_a_port(tmp_path):
    """A second server on the same port is an error, not half of the calls."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    first = start(ServeConfig(paths=(path,), port=0, device="cpu", threads=1))

    with pytest.raises(StartError, match="cannot be bound"):
        start(ServeConfig(paths=(path,), port=first.port, device="cpu", threads=1))

    first.stop(drain_s=0)


def test_a_stopped_server_gives_its_port_back(tmp_path):
    """A restart takes the same port at once."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    first = start(ServeConfig(paths=(path,), port=0, device="cpu", threads=1))
    first.stop(drain_s=0)

    second = start(ServeConfig(paths=(path,), port=first.port, device="cpu", threads=1))

    with Client(second.address) as client:
        assert client.ready()
    second.stop(drain_s=0)


def test_an_ipv6_address_is_bound(tmp_path):
    """Brackets are ours to add."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback here")
    server = start(ServeConfig(paths=(path,), host="::1", port=0, device="cpu", threads=1))

    assert server.address == f"[::1]:{server.port}"
    with Client(server.address) as client:
        assert client.ready()
    server.stop(drain_s=0)


def test_the_server_answers_without_torch_and_onnx(tmp_path):
    """What trains and exports is not there on an edge box; importing any of it would fail here."""
    blocked = ["torch", "torchvision", "transformers", "finetune", "export", "onnx", "sklearn", "pyarrow"]
    before = f"sys.modules.update(dict.fromkeys({blocked}))"
    with run_server(write_text_bundle(tmp_path / "b"), before, instances=2) as process:
        with Client(address_in(wait_for(process, '"event": "ready"'))) as client:
            assert client.predict("mood", ["the film is good"])["score"].shape == (1, 3)
        process.terminate()
        wait_for(process, '"event": "stopped"')
        assert process.wait() == 0


def test_importing_the_server_does_nothing(tmp_path):
    """No thread, no socket, no file, no line: everything waits for `start`."""
    program = """
import os, threading
import serve.server, serve.client
assert threading.active_count() == 1, threading.enumerate()
files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
assert not [file for file in files if "socket" in file], files
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)}
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_client_needs_no_runtime():
    """A caller installs grpcio, protobuf and numpy, and no ONNX Runtime."""
    program = "import sys; sys.modules['onnxruntime'] = None; import serve.client; print('imported')"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "imported\n"


def test_a_drained_service_refuses_by_status(slow):
    """The refusal comes from the service itself, so that every transport says the same."""
    config = ServeConfig(paths=(slow,), device="cpu", threads=1)
    service = Service(config, open_repository(config), Regions(enabled=False))
    service.drain()

    assert not service.ServerReady(pb.ServerReadyRequest()).ready
    assert not service.ModelReady(pb.ModelReadyRequest(name="slow")).ready
    assert service.ServerLive(pb.ServerLiveRequest()).live
    with pytest.raises(NotReady, match="stopping") as refused:
        service.begin(parse_request(pb.ModelInferRequest(model_name="slow").SerializeToString()), (), print, None)
    assert status(refused.value)[0] is grpc.StatusCode.UNAVAILABLE
