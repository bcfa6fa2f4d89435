"""The second session of a model: made when requests meet, with equal answers, and never in the way."""

import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bundle.errors import ModelError
from bundle.log import captured
from bundle.session import Session
from bundle.store import read_manifest, seal
from serve.client import Client
from serve.config import ServeConfig
from serve.server import start
from serve.spare import Spare
from tests.serve_bundles import identity, model_bytes, write_text_bundle

PATIENCE_S = 30


def join_spare():
    """What the thread of a spare for "m" says last belongs to the test that began it."""
    for thread in threading.enumerate():
        if thread.name == "spare-m":
            thread.join(PATIENCE_S)


def test_it_is_made_once_in_the_background():
    """Nobody waits for it: until it is there, there is none."""
    made, go = threading.Event(), threading.Event()

    def make():
        assert go.wait(PATIENCE_S)
        made.set()
        return "session"

    spare = Spare("m", make)

    assert spare.get() is None
    assert spare.get() is None
    go.set()
    assert made.wait(PATIENCE_S)
    while (session := spare.get()) is None:
        pass
    assert session == "session"
    join_spare()


def test_a_server_that_stops_meanwhile_has_not_ended(tmp_path):
    """The runtime that makes it cannot be stopped, and an interpreter that ends beside it would abort."""
    (tmp_path / "echo.onnx").write_bytes(identity(np.float32, [None, 2]))
    server = start(ServeConfig((tmp_path / "echo.onnx",), port=0, device="cpu"))
    go = threading.Event()
    Spare("m", lambda: go.wait(PATIENCE_S)).get()

    assert not server.stop()

    go.set()
    join_spare()


def test_one_that_cannot_be_made_is_told_once():
    """The model goes on with one session."""
    failed = threading.Event()

    def make():
        failed.set()
        raise ModelError("there is no such file")

    with captured() as logs:
        spare = Spare("m", make)
        assert spare.get() is None
        assert failed.wait(PATIENCE_S)
        join_spare()
    assert spare.get() is None
    told = [each["because"] for each in logs if each["event"] == "runs one at a time" and each["model"] == "m"]
    assert told == ["there is no such file"]


def test_one_that_no_thread_can_make_is_told_once(monkeypatch):
    """Whoever asks has requests in its hands, and answers them with the session that there is."""

    def none_left(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    spare = Spare("m", lambda: "session")

    with captured() as logs:
        assert [spare.get(), spare.get()] == [None, None]

    assert [each["because"] for each in logs if each.get("model") == "m"] == ["can't start new thread"]


@pytest.fixture
def dense(tmp_path):
    """A graph with enough to do for requests to meet: float32 (256, 512) through two dense layers."""
    chance = np.random.default_rng(0)
    weights = [chance.normal(size=(512, 512)).astype(np.float32) / 20 for _ in range(2)]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["y"]),
    ]
    x, y = ((name, TensorProto.FLOAT, [256, 512]) for name in "xy")
    path = tmp_path / "dense.onnx"
    path.write_bytes(model_bytes(nodes, [x], [y], {"w0": weights[0], "w1": weights[1]}))
    return path


def test_many_clients_get_the_answers_of_one(dense, monkeypatch):
    """Eight at a time bring about the second session; every answer is bit for bit that of the first."""
    monkeypatch.setattr("serve.models.cpu_count", lambda: 2)
    inputs = [np.random.default_rng(i).normal(size=(256, 512)).astype(np.float32) for i in range(8)]
    expected = [Session(dense.read_bytes(), device="cpu", threads=2).run({"x": x})["y"] for x in inputs]
    with captured() as logs:
        server = start(ServeConfig((dense,), port=0, device="cpu"))
        try:
            with Client(server.address) as client, ThreadPoolExecutor(8) as pool:
                for _ in range(10):
                    answers = pool.map(lambda x: client.infer("dense", {"x": x})["y"], inputs)
                    for answer, wanted in zip(answers, expected, strict=True):
                        np.testing.assert_array_equal(answer, wanted)
                    if any(each["event"] == "runs side by side" for each in logs):
                        break
        finally:
            server.stop()

    assert any(each["event"] == "runs side by side" for each in logs)


def test_a_file_that_has_changed_gives_no_second_session(dense, monkeypatch):
    """What is served is what was loaded: with another file in its place the model goes on with one session."""
    monkeypatch.setattr("serve.models.cpu_count", lambda: 2)
    with captured() as logs:
        server = start(ServeConfig((dense,), port=0, device="cpu"))
        try:
            dense.write_bytes(dense.read_bytes() + b"\0")
            with Client(server.address) as client, ThreadPoolExecutor(8) as pool:
                x = np.zeros((256, 512), np.float32)
                while not any(each["event"] == "runs one at a time" for each in logs):
                    assert all(
                        len(one["y"]) == 256 for one in pool.map(lambda _: client.infer("dense", {"x": x}), range(8))
                    )
        finally:
            server.stop()


def test_a_bundle_that_was_replaced_gives_no_second_session(tmp_path, monkeypatch):
    """Another one in its place, whole and sealed, may be another model, and no gate need have passed it."""
    monkeypatch.setattr("serve.models.cpu_count", lambda: 2)
    monkeypatch.setattr("bundle.model.cpu_count", lambda: 2)
    path = write_text_bundle(tmp_path / "mood")
    manifest = read_manifest(path)
    (variant,) = manifest.variants
    wide = msgspec.structs.replace(variant, latency=msgspec.structs.replace(variant.latency, threads=2))
    manifest = msgspec.structs.replace(manifest, variants=(wide,))
    seal(path, manifest)
    with captured() as logs:
        server = start(ServeConfig((path,), port=0, device="cpu"))
        try:
            graph = onnx.load(path / variant.file)
            graph.producer_name = "another"
            onnx.save(graph, path / variant.file)
            seal(path, manifest)
            texts = {"text": np.array([[b"a good film"]] * 64, object)}
            with Client(server.address) as client, ThreadPoolExecutor(8) as pool:
                while not any(each["event"].startswith("runs ") for each in logs):
                    list(pool.map(lambda _: client.infer("mood", texts), range(8)))
        finally:
            server.stop()

    (told,) = [each for each in logs if each["event"].startswith("runs ")]
    assert told["event"] == "runs one at a time"
    assert "sha256 differs" in told["because"]


def test_a_number_that_was_asked_for_is_kept(dense, monkeypatch):
    """With --threads or --instances runs are as they say."""
    monkeypatch.setattr("serve.models.cpu_count", lambda: 4)
    from serve.models import default_policy

    def policy(session_threads, fixed=False, **options):
        config = ServeConfig((dense,), **options)
        made = default_policy(config, joins=False, device="cpu", threads=session_threads, fixed=fixed)
        return made.splits, made.instances

    assert policy(4) == policy(3) == (True, 4)
    assert policy(2) == (False, 2)
    assert policy(1) == (False, 4)
    assert policy(4, fixed=True) == policy(4, threads=4) == (False, 1)
    assert policy(4, instances=2) == (False, 2)
    assert default_policy(ServeConfig((dense,)), joins=False, device="cuda", threads=4).splits is False
