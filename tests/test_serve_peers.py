import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from benchmarks.peers.serve_process import Server
from benchmarks.peers.serve_wires import HttpCaller, Wire, bentoml_answer, bentoml_request, http_request, wire
from benchmarks.serve_peers import Load, Side, table, told
from protos import inference_pb2 as pb

X = np.arange(300, dtype=np.float32).reshape(1, 300)


def load(ms):
    """Ten calls of one length, one after the other."""
    return Load(np.full(10, ms / 1e3), ms / 1e2)


def side(name, ms):
    """A server whose calls all took so long."""
    made = Side(name, sys.executable)
    made.loads = {1: [load(ms), load(ms)], 8: [load(ms), load(ms)]}
    return made


def test_v2_is_asked_as_ours_is():
    """The request names model and input, and the answer's tensor comes back."""
    to = wire("v2", 1, "tiny", X, "x")
    message = pb.ModelInferRequest.FromString(to.request)
    assert (message.model_name, message.inputs[0].name, list(message.inputs[0].shape)) == ("tiny", "x", [1, 300])
    answer = pb.ModelInferResponse(raw_output_contents=[X.tobytes()])
    np.testing.assert_array_equal(to.answer(answer.SerializeToString()), X.ravel())


def test_bentoml_messages_are_protobuf():
    """Fields are found by number, lengths above one byte included, and numbers without a length are passed over."""
    assert bentoml_request(X) == b"\x0a\x07predict\x12\xb0\x09" + X.tobytes()
    array = b"\x08\x01\x12\x02\x01\x0a\x1a\xb0\x09" + X.tobytes()
    message = b"\x0a" + bytes([len(array) & 127 | 128, len(array) >> 7]) + array
    np.testing.assert_array_equal(bentoml_answer(message), X.ravel())


class Echo(BaseHTTPRequestHandler):
    """Gives back what it got, over connections that are kept."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.path == "/predict" else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server.server_port
        server.shutdown()


def test_http_load_counts_answers(port):
    """Each call is answered with the tensor, by one connection and by three."""
    caller = HttpCaller(port, http_request(port, X))
    np.testing.assert_array_equal(Wire("http", port, b"").answer(caller.answers(1)[0]), X.ravel())
    for in_flight in (1, 3):
        found = caller.closed(in_flight, 0.02)
        assert len(found.latencies) >= in_flight
        assert found.seconds > 0


def test_http_fault_is_no_answer(port):
    """A status other than 200 is a fault, with the answer's head."""
    with pytest.raises(AssertionError, match="404"):
        HttpCaller(port, http_request(port, X).replace(b"/predict", b"/elsewhere")).answers(1)


def test_all_processes_of_a_server_are_found_and_end(tmp_path):
    """A child in a session of its own, and one without its parent's environment, belong to it and end with it."""
    program = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
hows = {"start_new_session": True}, {"env": {}}
children = [subprocess.Popen(sleep, stdout=subprocess.PIPE, **how) for how in hows]
for child in children:
    child.stdout.readline()
print("ready", flush=True)
time.sleep(60)
"""
    server = Server([sys.executable, "-c", program], tmp_path, dict(os.environ))
    try:
        while "ready" not in server.log.read_text():
            assert server.ended() is None
        assert len(server.processes()) == 3
        rss, pss = server.memory()
        assert rss >= pss > 0
    finally:
        server.stop()
    assert server.processes() == []
    assert server.ended().startswith("exit code -15")


def test_table_has_ratios_to_ours_and_reasons():
    """By latency; twice ours is 2.00; what broke stands last with its reason."""
    ours, slow, broken = side("edgeward", 1.0), side("naive", 2.0), Side("ray", "", error="it did not | start")
    lines = table([told(each, ours) for each in (broken, slow, ours)], {"naive": 100.0}).splitlines()[2:]
    assert lines[0].startswith("| edgeward | 1.00 | 1.00 |")
    assert lines[1].startswith("| naive | 2.00 | 2.00 | 2.00 | 500 | 0.50 |")
    assert lines[2].startswith("| ray | it did not / start |")
