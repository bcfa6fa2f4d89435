import io
import json
import logging
import os
import subprocess
import sys
from contextlib import suppress

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper

from bundle.errors import BadInput
from bundle.log import configure, log
from protos import inference_pb2 as pb
from serve import logs
from serve.client import Client
from serve.config import ServeConfig
from serve.errors import NotSupported
from serve.queue import Times
from serve.server import start
from tests.serve_bundles import identity, model_bytes

PROCESS = """
import sys
from bundle.log import log
from serve.config import ServeConfig
from serve.processes import _run

def serve(config):
    for number in range(20):
        log.info("ready", server=sys.argv[1], number=number)

_run(serve, ServeConfig(()))
"""


@pytest.fixture(autouse=True)
def _as_before():
    """What these tests configure ends with them."""
    level = logging.root.level
    yield
    logs.configure()
    logging.root.setLevel(level)
    configure()


def change(**settings):
    request = pb.LogSettingsRequest()
    for name, value in settings.items():
        kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(request.settings[name], kind, value)
    return {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in logs.log_settings(request).settings.items()
    }


def test_a_line_is_one_json_object_where_stderr_is_no_terminal(capsys):
    """Collectors of logs read lines; people read consoles."""
    logs.configure()
    log.info("ready", address="127.0.0.1:1", models=["a:1"])

    line = json.loads(capsys.readouterr().err)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "ready", "level": "info", "address": "127.0.0.1:1", "models": ["a:1"]}


def test_a_line_and_its_end_are_one_write(monkeypatch):
    """Processes that share stderr do not write into each other's lines."""
    written = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    logs.configure()
    log.info("ready")
    log.info("stopped")

    assert [json.loads(each)["event"] for each in written] == ["ready", "stopped"]
    assert all(each.endswith("\n") for each in written)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("fault", ["no reader", "closed", "none"])
def test_a_line_that_cannot_be_written_is_left_out(as_json, fault, monkeypatch):
    """Whoever has something to tell goes on with its work, and the next line is written where that is possible."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    logs.configure(json=as_json)
    if fault == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stderr", None if fault == "none" else stream)

    log.info("ready")
    logs.configure()

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with suppress(BrokenPipeError):
        stream.close()
    log.info("stopped")
    assert json.loads(sys.stderr.getvalue())["event"] == "stopped"


def test_a_terminal_gets_lines_for_people(capsys, monkeypatch):
    """On a terminal nobody has to read JSON, unless it is asked for."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logs.configure()
    log.info("ready")
    logs.configure(json=True)
    log.info("ready")

    people, machine = capsys.readouterr().err.splitlines()
    assert not people.startswith("{")
    assert json.loads(machine)["event"] == "ready"


@pytest.mark.parametrize("as_json", [True, False])
def test_a_client_cannot_write_a_line_of_its_own(as_json, capsys):
    """A request's id is the client's; neither a newline nor an escape sequence in it reaches the terminal."""
    logs.configure(json=as_json)
    times = Times(1)
    logs.log_request(logs.Ended("m", "", "a\n[error] b\x1b[2J", 1, grpc.StatusCode.OK, times))

    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert "\x1b" not in written


def test_an_error_keeps_its_traceback(capsys):
    """The cause of an internal error is in its line."""
    logs.configure()
    log.error("call failed", id="1a", exc_info=ValueError("of this"))

    assert "ValueError: of this" in json.loads(capsys.readouterr().err)["exception"]


def test_what_libraries_log_is_a_line_like_any_other(capsys, monkeypatch):
    """Python's own logging is not lost, and not mixed into the objects as plain text."""
    monkeypatch.setattr(logging.root, "handlers", [])
    logs.configure()
    logging.getLogger("grpc").warning("retrying in %d s", 3)

    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["name"], line["message"]) == ("warning", "grpc", "retrying in 3 s")


def test_a_client_that_leaves_in_the_middle_of_an_answer_is_no_error(tmp_path, monkeypatch, capsys):
    """Else each of them could write a traceback of grpc.aio's."""
    monkeypatch.setattr(logging.root, "handlers", [])
    logs.configure()
    path = tmp_path / "zeros.onnx"
    node = helper.make_node("ConstantOfShape", ["n"], ["y"])
    path.write_bytes(model_bytes([node], [("n", TensorProto.INT64, [1])], [("y", TensorProto.FLOAT, ["n"])]))
    server = start(ServeConfig((path,), port=0, device="cpu", threads=1, transport="asyncio"))
    with Client(server.address) as client:
        for number in range(1, 4):
            with Client(server.address) as leaving:
                answers = leaving.stream("zeros", [{"n": np.array([12_000_000])}] * 3)
                next(answers)
                while client.statistics("zeros")[0].inference_count < 3 * number:
                    pass
    assert server.stop()

    assert '"event": "library"' not in capsys.readouterr().err


def test_a_request_is_one_line_with_its_stages(capsys):
    """Model, version, id, rows, status, and how long each stage took."""
    logs.configure(requests=True)
    assert logs.logs_requests()
    times = Times(queued=1_000_000, started=3_000_000, decoded=3_500_000, ran=7_500_000, ended=7_600_000)
    logs.log_request(logs.Ended("mood", "3", "x", 4, grpc.StatusCode.OK, times))

    line = json.loads(capsys.readouterr().err)
    del line["timestamp"], line["level"], line["event"]
    assert line == {
        "model": "mood", "version": "3", "id": "x", "rows": 4, "code": "OK",
        "queue_ms": 2.0, "decode_ms": 0.5, "run_ms": 4.0, "encode_ms": 0.1,
    }  # fmt: skip


def test_a_request_that_did_not_run_has_the_stages_that_it_reached(capsys):
    """A request that was refused or timed out has no duration of what never happened."""
    logs.configure(requests=True)
    for times in (None, Times(queued=1, ended=9), Times(queued=1, started=5, ended=9)):
        logs.log_request(logs.Ended("m", "", "", 0, grpc.StatusCode.UNAVAILABLE, times))

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [[key for key in line if key.endswith("_ms")] for line in lines] == [[], [], ["queue_ms"]]


def test_a_long_id_is_cut(capsys):
    """An id may be as long as a message; its line is not."""
    logs.configure()
    logs.log_request(logs.Ended("m" * 1000, "", "i" * 1000, 0, grpc.StatusCode.NOT_FOUND))

    line = json.loads(capsys.readouterr().err)
    assert line["model"] == "m" * logs.MAX_TEXT + "…"
    assert line["id"] == "i" * logs.MAX_TEXT + "…"


def test_settings_are_tritons_and_tell_what_holds():
    """Without changes the call only tells; each answer holds every setting."""
    assert change() == {
        "log_file": "", "log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0,
        "log_format": "default",
    }  # fmt: skip
    assert change(log_info=False, log_format="ISO8601") == {
        "log_file": "", "log_info": False, "log_warning": True, "log_error": True, "log_verbose_level": 0,
        "log_format": "ISO8601",
    }  # fmt: skip
    assert change(log_info=True)["log_format"] == "ISO8601"


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_a_level_that_is_switched_off_is_not_logged(level, capsys):
    """Each level is switched alone, and at once."""
    logs.configure()
    change(**{f"log_{level}": False})
    for each in ("info", "warning", "error"):
        getattr(log, each)("now")

    levels = [json.loads(line)["level"] for line in capsys.readouterr().err.splitlines()]
    assert set(levels) == {"info", "warning", "error"} - {level}


def test_verbosity_switches_the_lines_of_requests():
    """From verbose level 1 on every request is logged, as --log-requests does it from the start."""
    logs.configure()
    assert not logs.logs_requests()
    change(log_verbose_level=1)
    assert logs.logs_requests()
    change(log_verbose_level=0)
    assert not logs.logs_requests()


def test_no_path_of_a_client_is_ever_opened(tmp_path):
    """The log goes nowhere else, whatever the file is called, and nothing of the call holds."""
    for path in (str(tmp_path / "log"), ""):
        with pytest.raises(NotSupported, match="log file location can not be updated"):
            change(log_info=False, log_file=path)

    assert list(tmp_path.iterdir()) == []
    assert change()["log_info"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_infos": True}, "unknown log setting 'log_infos'"),
        ({"log_info": 1}, "'log_info' has uint32_param; expected bool_param"),
        ({"log_verbose_level": True}, "'log_verbose_level' has bool_param; expected uint32_param"),
        ({"log_format": "xml"}, "'log_format' is 'xml'; expected default or ISO8601"),
    ],
)
def test_what_is_no_setting_is_refused_whole(settings, message):
    """A call that holds one wrong value changes nothing."""
    with pytest.raises(BadInput, match=message):
        change(log_error=False, **settings)

    assert change()["log_error"] is True


def test_a_setting_without_a_value_is_refused():
    """Triton's client sends such a one for None."""
    request = pb.LogSettingsRequest()
    request.settings["log_info"].SetInParent()

    with pytest.raises(BadInput, match="'log_info' has no value"):
        logs.log_settings(request)


def test_the_processes_of_a_server_log_alike():
    """Each of several processes writes JSON lines to stderr, as one process does."""
    reader, writer = os.pipe()
    servers = [subprocess.Popen([sys.executable, "-c", PROCESS, name], stderr=writer) for name in ("first", "second")]
    os.close(writer)
    with open(reader) as file:
        lines = [json.loads(line) for line in file]
    assert [server.wait(60) for server in servers] == [0, 0]

    for name in ("first", "second"):
        assert [line["number"] for line in lines if line["server"] == name] == list(range(20))


@pytest.mark.parametrize("json", [True, False])
def test_the_line_of_a_fault_shows_no_variables(capsys, json):
    """The frames of a failed call hold its inputs and its token."""
    logs.configure(json=json)
    metadata = [("authorization", "Bearer reader-token-0001")]
    try:
        raise RuntimeError(f"a fault, {len(metadata)} header")
    except RuntimeError as error:
        log.error("call failed", exc_info=error)

    shown = capsys.readouterr().err
    assert "a fault, 1 header" in shown
    assert "reader-token" not in shown


STALLED = """
import sys
from pathlib import Path
from serve import logs
from serve.config import ServeConfig
from serve.server import serve
logs.configure(requests=True)
serve(ServeConfig((Path(sys.argv[1]),), port=0, device="cpu", threads=1, transport=sys.argv[2], log_requests=True))
"""


@pytest.mark.parametrize("transport", ["auto", "asyncio"])
def test_who_does_not_read_the_log_keeps_nobody_waiting(tmp_path, transport):
    """A pipe holds some 300 lines of requests; what is told beyond these is lost, and the server ends as it is told."""
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    command = [sys.executable, "-c", STALLED, str(path), transport]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        ready = next(line for line in process.stderr if '"event": "ready"' in line)
        with Client(json.loads(ready)["address"]) as client:
            for _ in range(1000):
                client.infer("echo", {"x": np.zeros((1, 2), np.float32)})
            process.terminate()
            assert process.wait(60) == 0
        told = [json.loads(line)["event"] for line in process.stderr.read().splitlines()]
    assert 100 < told.count("request") < 1000
