"""A server that watches its disk, over gRPC: versions come while clients call, and no call fails."""

import threading
import time

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from serve.config import ServeConfig
from serve.server import start
from tests.serve_bundles import identity

PATIENCE_S = 20.0  # until a test gives up; what it waits for comes in a fraction of a second


def write_version(repository, version, graph=None):
    """A version of model m that is whole or not there."""
    beside = repository / f".{version}"
    beside.mkdir(parents=True)
    (beside / "model.onnx").write_bytes(graph or identity(np.float32, [None, 2]))
    (repository / "m").mkdir(exist_ok=True)
    beside.rename(repository / "m" / str(version))


@pytest.fixture
def stub(tmp_path):
    write_version(tmp_path, 1)
    server = start(ServeConfig(paths=(tmp_path,), port=0, device="cpu", threads=1, watch=True))
    with grpc.insecure_channel(server.address) as channel:
        yield rpc.GRPCInferenceServiceStub(channel)
    server.stop(0)


def infer(stub):
    """The version that answered."""
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(bytes(8))
    return int(stub.ModelInfer(request, timeout=PATIENCE_S).model_version)


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_versions_come_while_clients_call(tmp_path, stub):
    """Each call is answered, by a version that is not older than the one that answered the call before it."""
    stop, versions, failed = threading.Event(), [infer(stub)], []

    def call():
        try:
            while not stop.is_set():
                versions.append(infer(stub))
        except grpc.RpcError as error:
            failed.append(error.details())

    caller = threading.Thread(target=call)
    caller.start()
    for version in (2, 3, 4):
        write_version(tmp_path, version)
        wait_for(lambda version=version: failed or versions[-1] == version)
    stop.set()
    caller.join()

    assert not failed
    assert versions == sorted(versions)
    assert set(versions) == {1, 2, 3, 4}


def test_a_bad_version_is_in_the_index_and_the_old_one_answers(tmp_path, stub):
    """A client reads why, in words without a path."""

    def entries():
        return {
            (one.version, one.state): one.reason for one in stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
        }

    write_version(tmp_path, 2, b"no graph")
    wait_for(lambda: ("2", "UNAVAILABLE") in entries())

    assert entries() == {("1", "READY"): "", ("2", "UNAVAILABLE"): "the graph cannot be loaded"}
    assert infer(stub) == 1
    assert stub.ModelReady(pb.ModelReadyRequest(name="m")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="m", version="2")).ready
