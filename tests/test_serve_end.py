"""How a server ends: what it still does, what it waits for, and for how long."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from protos import inference_pb2 as pb
from serve import wire
from serve.client import Client
from serve.config import ServeConfig
from serve.repository import Repository
from serve.server import start
from tests.serve_bundles import counter, has_to_wait, identity, model_bytes
from tests.server_process import address_in, run_server, wait_for

MANY = 12_000_000  # float32, 48 MB: more than the buffers of two sockets hold

OPTIONS = {"instances": 1, "drain_s": 0.1, "admin": True}


@pytest.fixture(params=["auto", "asyncio"])
def transport(request):
    return request.param


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_that_outlasts_the_drain_does_not_keep_the_process(tmp_path, transport, streamed):
    """It cannot be stopped, and Python would wait for its thread, or abort."""
    path = tmp_path / "slow.onnx"
    path.write_bytes(counter())
    with ThreadPoolExecutor() as pool, run_server(path, transport=transport, **OPTIONS) as process:
        client = Client(address_in(wait_for(process, '"event": "ready"')))
        feeds = {"n": np.array(10_000_000_000)}
        if streamed:
            call = pool.submit(lambda: list(client.stream("slow", [feeds])))
        else:
            call = pool.submit(client.infer, "slow", feeds)
        while not has_to_wait(client, "slow"):
            pass
        process.terminate()
        wait_for(process, '"event": "stopped"')
        assert process.wait(60) == 0
        assert call.exception() is not None
        client.close()


def test_a_run_of_an_unloaded_version_does_not_keep_the_process(tmp_path, transport):
    """It has outlasted the drain of its version, and goes on when the server ends."""
    path = tmp_path / "slow.onnx"
    path.write_bytes(counter())
    with ThreadPoolExecutor() as pool, run_server(path, transport=transport, **OPTIONS) as process:
        client = Client(address_in(wait_for(process, '"event": "ready"')))
        call = pool.submit(lambda: list(client.stream("slow", [{"n": np.array(10_000_000_000)}])))
        while not has_to_wait(client, "slow"):
            pass
        client.unload("slow")
        process.terminate()

        assert process.wait(60) == 0
        assert call.exception() is not None
        client.close()


def test_a_run_that_outlasted_the_drain_of_its_version_may_have_ended_since(tmp_path, transport):
    """Then the server ends as any other."""
    path, began, let_go = tmp_path / "echo.onnx", threading.Event(), threading.Event()
    path.write_bytes(identity(np.float32, [None, 2]))
    server = start(ServeConfig((path,), port=0, device="cpu", threads=1, transport=transport, **OPTIONS))
    model = server._repository.find("echo", "").model
    run = model.run
    object.__setattr__(model, "run", lambda *arguments: began.set() or (let_go.wait(60) and run(*arguments)))
    with Client(server.address) as client, ThreadPoolExecutor() as pool:
        call = pool.submit(client.infer, "echo", {"x": np.zeros((1, 2), np.float32)})
        assert began.wait(60)
        client.unload("echo")
        let_go.set()
        call.result()

        assert server.stop(0)


@pytest.fixture
def server(tmp_path, transport):
    path = tmp_path / "zeros.onnx"
    node = helper.make_node("ConstantOfShape", ["n"], ["y"])
    path.write_bytes(model_bytes([node], [("n", TensorProto.INT64, [1])], [("y", TensorProto.FLOAT, ["n"])]))
    return start(ServeConfig((path,), port=0, device="cpu", threads=1, transport=transport))


class Narrow:
    """A way to a server on which its answers stop after the first megabyte, until they are let go."""

    def __init__(self, port):
        self.let_go = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, args=(port,), daemon=True).start()

    def _accept(self, port):
        with self._listening:
            client, server = self._listening.accept()[0], socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=_pump, args=(client, server, None), daemon=True).start()
        _pump(server, client, self.let_go)


def _pump(source, target, let_go):
    passed = 0
    with suppress(OSError):
        while data := source.recv(1 << 16):
            passed += len(data)
            if let_go and passed > 1 << 20:
                let_go.wait(60)
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
    source.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_is_being_written_is_written_to_its_end(server, streamed):
    """Whoever reads slowly has the drain's time for it, as one whose model still runs."""
    narrow, feeds = Narrow(server.port), {"n": np.array([MANY])}
    with Client(narrow.address) as slow, Client(server.address) as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(lambda: next(slow.stream("zeros", [feeds])) if streamed else slow.infer("zeros", feeds))
        while not client.statistics("zeros")[0].inference_count:
            pass
        stopped = pool.submit(server.stop, 60)
        time.sleep(2)  # twice as long as the last bytes of what is drained may take
        waits = not stopped.done()
        narrow.let_go.set()

        assert waits
        assert answer.result()["y"].shape == (MANY,)
        assert stopped.result()


def test_while_a_model_is_loaded_a_stopping_server_says_so(tmp_path, transport, monkeypatch):
    """Readiness and health do not wait for a look at the disk, nor does the end."""
    path, let_go, looks = tmp_path / "echo.onnx", threading.Event(), threading.Event()
    path.write_bytes(identity(np.float32, [None, 2]))
    monkeypatch.setattr(wire, "END_S", 0.1)
    monkeypatch.setattr(Repository, "refresh", lambda self: looks.set() or let_go.wait(60))
    server = start(ServeConfig((path,), port=0, device="cpu", threads=1, watch=True, transport=transport))
    assert looks.wait(60)

    assert not server.stop()

    assert not server._service.ServerReady(pb.ServerReadyRequest()).ready
    let_go.set()


def test_a_load_that_outlasts_the_drain_does_not_keep_the_process(tmp_path, transport):
    """A client has asked for it."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    before = """
import time
from serve.repository import Repository
Repository.load = lambda self, name, given_up: sys.stderr.write("loading\\n") and time.sleep(3600)
"""
    with ThreadPoolExecutor() as pool, run_server(path, before, transport=transport, **OPTIONS) as process:
        client = Client(address_in(wait_for(process, '"event": "ready"')))
        call = pool.submit(client.load, "echo")
        wait_for(process, "loading")
        process.terminate()
        assert process.wait(60) == 0
        assert call.exception() is not None
        client.close()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_a_signal_that_another_thread_gets_is_heard(tmp_path):
    """The system may choose any; Python's handler runs in the main thread, which nothing wakes then."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    with run_server(path) as process:
        wait_for(process, '"event": "ready"')
        others = {int(each.name) for each in Path(f"/proc/{process.pid}/task").iterdir()} - {process.pid}
        os.kill(max(others), signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_it_is_ready_a_signal_ends_it_at_once(tmp_path, number):
    """Also while a library keeps Python from running, as ONNX Runtime does while it loads a model."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    before = """
import ctypes
import serve.server as module
module.open_repository = lambda config: sys.stderr.write("loading\\n") and ctypes.PyDLL(None).sleep(3600)
"""
    with run_server(path, before) as process:
        wait_for(process, "loading")
        process.send_signal(number)

        assert process.wait(60) == -number
