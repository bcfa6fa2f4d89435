"""What is kept of requests that are alike, and what must not be."""

import random
import uuid

import grpc
import numpy as np
import pytest

from bundle.tensor import NUMPY_TYPES, TensorSpec
from protos import inference_pb2 as pb
from serve import envelope
from serve.config import ServeConfig
from serve.envelope import KEPT, parse_request
from serve.outputs import Wanted, write_answer
from serve.parameters import SharedPlace
from serve.server import start
from serve.shared_memory import FOLDER, Regions
from serve.tensors import to_raw
from tests.serve_bundles import identity


def request(name="echo", **fields):
    made = pb.ModelInferRequest(model_name=name, raw_input_contents=[bytes(8)], **fields)
    made.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    return made


def test_requests_that_are_alike_have_one_envelope():
    """Ids and tensors do not count, everything else does."""
    one = parse_request(request(id="1").SerializeToString())
    other = request(id="2")
    other.raw_input_contents[0] = b"another!"
    two = parse_request(other.SerializeToString())
    priority = {"priority": pb.InferParameter(int64_param=1)}

    assert one.envelope is two.envelope
    assert (one.id, two.id) == ("1", "2")
    assert [bytes(raw) for raw in two.raws] == [b"another!"]
    for fields in ({"model_version": "1"}, {"parameters": priority}):
        assert parse_request(request(**fields).SerializeToString()).envelope is not one.envelope
    assert parse_request(request("other").SerializeToString()).envelope is not one.envelope


def test_large_envelopes_are_not_kept_nor_more_than_so_many():
    """Tensors in the message itself, and clients that never send the same twice, take no memory for good."""
    large = request()
    large.inputs[0].contents.fp32_contents.extend([1.0] * 2000)
    read = [parse_request(large.SerializeToString()).envelope for _ in range(2)]

    assert read[0] is not read[1]
    assert not read[0].kept
    first = parse_request(request("first").SerializeToString()).envelope
    for number in range(KEPT):
        parse_request(request(f"model {number}").SerializeToString())
    assert parse_request(request("first").SerializeToString()).envelope is not first
    assert envelope._kept.cache_info().currsize == KEPT


@pytest.fixture
def server(tmp_path):
    (tmp_path / "echo.onnx").write_bytes(identity(np.float32, [None, 2]))
    shared = FOLDER.is_dir()
    server = start(ServeConfig((tmp_path / "echo.onnx",), port=0, device="cpu", threads=1, shared_memory=shared))
    yield server
    server.stop(drain_s=0)


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs /dev/shm")
def test_regions_of_shared_memory_are_looked_up_at_each_call(stub):
    """A region that went is missed, and one that came under its name is read, by a request that was sent before."""
    asked = request()
    del asked.raw_input_contents[:]
    asked.inputs[0].parameters["shared_memory_region"].string_param = "r"
    asked.inputs[0].parameters["shared_memory_byte_size"].int64_param = 8
    for value in (1.0, 2.0):
        path = FOLDER / f"edgeward-test-{uuid.uuid4().hex}"
        path.write_bytes(np.float32([value, value]).tobytes())
        try:
            stub.SystemSharedMemoryRegister(
                pb.SystemSharedMemoryRegisterRequest(name="r", key=f"/{path.name}", byte_size=8)
            )
        finally:
            path.unlink()
        assert stub.ModelInfer(asked).raw_output_contents[0] == np.float32([value, value]).tobytes()
        stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name="r"))
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            stub.ModelInfer(asked)


def test_a_model_that_takes_another_s_place_reads_requests_anew(server, stub, tmp_path):
    """What its predecessor took may be refused, and what it refused may be taken."""
    wider = request()
    wider.inputs[0].shape[:], wider.raw_input_contents[0] = [1, 3], bytes(12)
    assert len(stub.ModelInfer(request()).raw_output_contents[0]) == 8
    with pytest.raises(grpc.RpcError, match="shape"):
        stub.ModelInfer(wider)

    (tmp_path / "echo.onnx").write_bytes(identity(np.float32, [None, 3]))
    server._repository.refresh()

    assert len(stub.ModelInfer(wider).raw_output_contents[0]) == 12
    with pytest.raises(grpc.RpcError, match="shape"):
        stub.ModelInfer(request())


def test_answers_are_the_bytes_that_protobuf_writes():
    """Outputs of every datatype, of any number, shape and size, with and without an id."""
    chance, numpy_chance = random.Random(1), np.random.default_rng(1)
    for _ in range(300):
        expected = pb.ModelInferResponse(model_name="m" * chance.choice([1, 127, 128]), model_version="3")
        expected.id = "é" * chance.choice([0, 1, 64, 20_000])
        wanted, arrays = [], {}
        for number in range(chance.randrange(4)):
            spec = TensorSpec(f"y{number}", chance.choice(list(NUMPY_TYPES)), (-1, -1))
            shape = tuple(chance.choice([0, 1, 3, 150]) for _ in range(chance.randrange(3)))
            values = numpy_chance.integers(0, 2, shape)
            arrays[spec.name] = values.astype(NUMPY_TYPES[spec.datatype])
            if spec.datatype == "BYTES":
                arrays[spec.name] = np.full(shape, b"text", object)
            wanted.append(Wanted(spec))
            expected.outputs.add(name=spec.name, datatype=spec.datatype, shape=shape)
            expected.raw_output_contents.append(to_raw(arrays[spec.name], spec.datatype))

        names = (expected.model_name, expected.model_version)
        answer = write_answer(names, expected.id, wanted, {}, arrays, {}, batched=False)

        assert answer == expected.SerializeToString()


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs /dev/shm")
def test_answers_say_what_is_in_shared_memory():
    """Where it is and how much, as it is at this call."""
    path = FOLDER / f"edgeward-test-{uuid.uuid4().hex}"
    path.write_bytes(bytes(64))
    regions = Regions(enabled=True)
    regions.register("r", f"/{path.name}", 0, 64)
    path.unlink()
    wanted = [Wanted(TensorSpec("y", "FP32", (-1,)), SharedPlace("r", 0, 64)), Wanted(TensorSpec("z", "FP32", (-1,)))]
    for length in (4, 5):
        arrays = {"y": np.ones(length, np.float32), "z": np.zeros(1, np.float32)}

        data = write_answer(("m", "1"), "", wanted, {"y": regions.part("r", 0, 64)}, arrays, {}, batched=False)

        answer = pb.ModelInferResponse.FromString(data)
        assert list(answer.raw_output_contents) == [b"", bytes(4)]
        assert answer.outputs[0].parameters["shared_memory_region"].string_param == "r"
        assert answer.outputs[0].parameters["shared_memory_byte_size"].int64_param == 4 * length
        assert not answer.outputs[1].parameters
