"""Random damage to good requests: every answer is one of docs/protocol.md, and nothing that is sent ends the server."""

import random

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve import envelope
from serve.config import ServeConfig
from serve.server import start
from tests.serve_bundles import identity, model_bytes, write_text_bundle

ROUNDS = 300
REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}
NUMBERS = [0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**60 + 2, 2**63 - 1, -(2**63)]
NAMES = [
    "",
    "x",
    "y",
    "z",
    "echo",
    "words",
    "mood",
    "text",
    "0",
    "1",
    "\0",
    "../echo",
    "é" * 200,
    "triton_x",
    "priority",
]
DATATYPES = ["", "BOOL", "INT8", "UINT64", "FP16", "BF16", "FP32", "FP64", "BYTES", "fp32", "STRING"]
FIELDS = ["bool", "int", "int64", "uint", "uint64", "fp32", "fp64", "bytes"]
KEYS = [
    "priority",
    "timeout",
    "sequence_id",
    "classification",
    "shared_memory_region",
    "shared_memory_byte_size",
    "mine",
]
CHOICES = {
    "bool_param": True,
    "int64_param": -1,
    "string_param": "r",
    "double_param": np.nan,
    "uint64_param": 2**64 - 1,
}


def pair():
    """Two inputs of two types, and what came of them."""
    return model_bytes(
        [helper.make_node("Identity", ["a"], ["c"]), helper.make_node("Identity", ["b"], ["d"])],
        [("a", TensorProto.INT8, [None]), ("b", TensorProto.BFLOAT16, [])],
        [("c", TensorProto.INT8, [None]), ("d", TensorProto.BFLOAT16, [])],
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_text_bundle(root / "mood")
    graphs = {"echo": identity(np.float32, [None, 2]), "words": identity(object, [None]), "pair": pair()}
    for name, data in graphs.items():
        (root / f"{name}.onnx").write_bytes(data)
    paths = (root / "mood", *(root / f"{name}.onnx" for name in graphs))
    server = start(ServeConfig(paths=paths, port=0, device="cpu", threads=1, max_message_bytes=1 << 20))
    yield server
    server.stop(drain_s=0)


def good():
    """One request to each model, with all that a request can have."""
    echo = pb.ModelInferRequest(model_name="echo", model_version="1", id="7", raw_input_contents=[bytes(8)])
    echo.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    echo.outputs.add(name="y").parameters["classification"].int64_param = 1
    echo.parameters["mine"].string_param = "value"
    words = pb.ModelInferRequest(model_name="words", raw_input_contents=[b"\1\0\0\0a\2\0\0\0bc"])
    words.inputs.add(name="x", datatype="BYTES", shape=[2])
    two = pb.ModelInferRequest(model_name="pair", raw_input_contents=[b"\0\0", b"\1\2\3"])
    two.inputs.add(name="b", datatype="BF16", shape=[])
    two.inputs.add(name="a", datatype="INT8", shape=[3])
    two.outputs.add(name="d")
    text = pb.ModelInferRequest(model_name="mood")
    text.inputs.add(name="text", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"good film")
    typed = pb.ModelInferRequest(model_name="echo")
    typed.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    return [echo, words, two, text, typed]


def damaged_bytes(data, chance):
    """A serialised request in which one byte is another, or one or two slices are changed, removed or doubled."""
    data = bytearray(data)
    if chance.random() < 0.7:
        data[chance.randrange(len(data))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        return bytes(data)
    for _ in range(chance.randint(1, 2)):
        start = chance.randrange(len(data) + 1)
        end = start + chance.choice([0, 1, 2, 8, len(data)])
        part = bytes(data[start:end])
        data[start:end] = chance.choice([b"", part * 2, chance.randbytes(len(part)), b"\x80", chance.randbytes(3)])
    return bytes(data)


def damaged_fields(request, chance):
    """One to three fields of a request set to what they might be, or should never be."""
    message = pb.ModelInferRequest.FromString(request.SerializeToString())
    for _ in range(chance.randint(1, 3)):
        tensor = chance.choice(message.inputs) if message.inputs else message.inputs.add()
        match chance.randrange(8):
            case 0:
                setattr(message, chance.choice(["model_name", "model_version"]), chance.choice(NAMES))
            case 1:
                chance.choice([tensor, *message.outputs]).name = chance.choice(NAMES)
            case 2:
                tensor.datatype = chance.choice(DATATYPES)
            case 3:
                tensor.shape[:] = chance.choices(NUMBERS, k=chance.randint(0, 4))
            case 4:
                raw = message.raw_input_contents
                raw[:] = chance.choice([[], [*raw, b""], [each[:-1] for each in raw], [b"\xff" * 8 for _ in raw]])
            case 5:
                field = getattr(tensor.contents, f"{chance.choice(FIELDS)}_contents")
                field.extend([b"\xff"] if field is tensor.contents.bytes_contents else [1])
            case 6:
                holder = chance.choice([message, tensor, *message.outputs])
                choice = chance.choice(list(CHOICES))
                setattr(holder.parameters[chance.choice(KEYS)], choice, CHOICES[choice])
            case 7:
                message.inputs.extend([tensor] if chance.random() < 0.5 else [])
                del message.inputs[chance.randrange(len(message.inputs))]
    return message.SerializeToString()


@pytest.mark.parametrize("damage", ["bytes", "fields"])
def test_random_damage_is_refused_by_the_table_and_harms_nobody(server, damage):
    """Nothing is unforeseen: no answer is an error that the log would have to explain; good requests go on."""
    chance = random.Random(5)
    requests = good()
    codes = []
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for number in range(ROUNDS):
            request = requests[number % len(requests)]
            spoilt = damaged_fields(request, chance) if damage == "fields" else None
            data = spoilt or damaged_bytes(request.SerializeToString(), chance)
            codes.append(status(call, data))
            assert codes[-1] in {"OK", "no message", *REFUSALS}, (codes[-1], data)
        assert {len(stub.ModelInfer(request, timeout=10).outputs) for request in requests} == {1, 3}
    assert "INVALID_ARGUMENT" in codes
    assert "NOT_FOUND" in codes


@pytest.mark.parametrize("damage", [damaged_bytes, damaged_fields])
def test_what_was_kept_of_a_request_before_changes_no_answer(server, damage, monkeypatch):
    """Good or bad, the first of two equal requests, the second, and one that protobuf alone read get the same."""
    chance = random.Random(6)
    requests = good()
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for number in range(ROUNDS):
            request = requests[number % len(requests)]
            request.id = "é" * chance.choice([0, 1, 63, 64, 9000])
            sent = request if damage is damaged_fields else request.SerializeToString()
            data = damage(sent, chance) if chance.random() < 0.9 else request.SerializeToString()
            first, second = outcome(call, data), outcome(call, data)
            with monkeypatch.context() as patch:
                patch.setattr(envelope, "_split", lambda data: None)
                assert first == second == outcome(call, data), data
            if isinstance(first, bytes):
                assert first == pb.ModelInferResponse.FromString(first).SerializeToString()


def outcome(call, data):
    """The answer, or what is told instead."""
    try:
        return call(data, timeout=10)
    except grpc.RpcError as error:
        return error.code(), error.details()


def status(call, data):
    """Of one call; "no message" where the bytes cannot be parsed."""
    try:
        call(data, timeout=10)
    except grpc.RpcError as error:
        if parsed(data):
            return f"{error.code().name} {error.details()}" if error.code().name not in REFUSALS else error.code().name
        return "no message" if error.code().name in ("INTERNAL", "INVALID_ARGUMENT") else error.code().name
    return "OK"


def parsed(data):
    """Whether the bytes are a request at all."""
    try:
        pb.ModelInferRequest.FromString(data)
    except Exception:
        return False
    return True
