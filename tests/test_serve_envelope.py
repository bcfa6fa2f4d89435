"""Requests with large tensors are read as protobuf reads them, but for the copies."""

import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from bundle.errors import BadInput
from bundle.tensor import TensorSpec
from protos import inference_pb2 as pb
from serve import envelope
from serve.inputs import describe_inputs, read_inputs
from serve.shared_memory import Regions


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch):
    monkeypatch.setattr(envelope, "_SMALL", 0)


def random_request(chance):
    request = pb.ModelInferRequest(model_name="m" * chance.randrange(300), id=chance.choice(["", "é7"]))
    request.raw_input_contents.extend(chance.randbytes(chance.choice((0, 1, 127, 128, 20_000))) for _ in range(3))
    for name in "abc"[: chance.randrange(4)]:
        tensor = request.inputs.add(name=name, datatype="FP32", shape=[chance.randrange(-3, 2**40)])
        tensor.parameters["p"].int64_param = chance.randrange(9)
        tensor.contents.fp32_contents.extend([0.5] * chance.randrange(3))
    if chance.random() < 0.5:
        request.parameters["q"].string_param = "x" * chance.randrange(200)
        request.outputs.add(name="y")
    return request


def same(data):
    """Whether a message is read as protobuf reads it, or refused as protobuf refuses it."""
    try:
        expected = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        with pytest.raises(BadInput):
            envelope.parse_request(data)
        return True
    first, again = envelope.parse_request(data), envelope.parse_request(data)
    assert first.envelope.message == again.envelope.message
    request, raws = pb.ModelInferRequest(), list(first.raws)
    request.CopyFrom(first.envelope.message)
    request.id = first.id
    wanted = list(expected.raw_input_contents)
    for message in (expected, request):
        message.ClearField("raw_input_contents")
    return [bytes(raw) for raw in raws] == wanted and request == expected


def test_random_requests_are_read_as_protobuf_reads_them():
    """Names, shapes, parameters and contents of any length; the raw contents are views, not copies."""
    chance = random.Random(1)
    for _ in range(500):
        request = random_request(chance)
        assert same(request.SerializeToString())

    raws = envelope.parse_request(request.SerializeToString()).raws
    assert all(isinstance(raw, memoryview) for raw in raws)


def test_fields_in_any_order_and_in_parts_are_read_as_protobuf_reads_them():
    """Concatenated messages are merged; what is repeated adds up."""
    chance = random.Random(2)
    for _ in range(200):
        assert same(random_request(chance).SerializeToString() + random_request(chance).SerializeToString())


@pytest.mark.parametrize(
    "odd",
    [
        b"\x3a\x81\x00x",  # a length in more bytes than it needs
        b"\x3a\x81\x80\x80\x80\x00x",
        b"\xba\x00\x01x",  # a tag in more bytes than it needs
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x3a\x05x",  # cut off
        b"\x3a",
        b"\x3a\x80",
        b"\x38\x07",  # raw_input_contents as a number
        b"\x3d\x00\x00\x00\x00",
        b"\x3b\x3c",  # a group
        b"\x02\x00",  # field 0
        b"\x7a\x01x\x42\x00",  # fields that nobody knows
        b"\xfa\x01\x01x",
        b"\x0a\x01\xff",  # a name that is not UTF-8
        b"\x1a\x01\xff\x1a\x01x",  # the same of an id that another one follows
    ],
    ids=bytes.hex,
)
def test_what_only_protobuf_knows_is_left_to_it(odd):
    """In front, behind and alone."""
    request = random_request(random.Random(3)).SerializeToString()

    assert same(odd)
    assert same(odd + request)
    assert same(request + odd)


def test_random_damage_is_read_as_protobuf_reads_it():
    """Any byte changed, put in or cut out."""
    chance = random.Random(4)
    for _ in range(3000):
        data = bytearray(random_request(chance).SerializeToString()[:400])
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(data) + 1)
            data[place : place + chance.randrange(2)] = chance.randbytes(chance.randrange(2))
        assert same(bytes(data))


@pytest.mark.parametrize("field", ["inputs", "outputs", "raw_input_contents"])
@pytest.mark.parametrize("odd", [b"", b"\xfa\x01\x01x"], ids=["ours", "protobuf's"])
def test_a_request_has_so_many_fields_at_most(field, odd):
    """Whoever reads it: a message of nothing but small fields is refused before objects are made of them."""
    tag = bytes([pb.ModelInferRequest.DESCRIPTOR.fields_by_name[field].number << 3 | 2])

    envelope.parse_request(odd + (tag + b"\0") * envelope.MAX_FIELDS)
    with pytest.raises(BadInput, match="more than 4096 tensors and parameters"):
        envelope.parse_request(odd + (tag + b"\0") * (envelope.MAX_FIELDS + 1))


def test_only_what_takes_little_memory_is_kept():
    """An envelope of many tensors that say nothing is small only while it is bytes."""
    few, many = (pb.ModelInferRequest(inputs=[{}] * count).SerializeToString() for count in (64, 65))

    assert envelope.parse_request(few).envelope is envelope.parse_request(few).envelope
    assert envelope.parse_request(many).envelope is not envelope.parse_request(many).envelope


def test_tensors_lie_where_the_machine_may_expect_them():
    """Wherever in the message a tensor begins, its array is aligned; bytes are not copied."""
    specs = [TensorSpec("x", "FP32", (4,)), TensorSpec("u", "UINT8", (4,))]
    values = {"x": np.arange(4, dtype=np.float32), "u": np.arange(4, dtype=np.uint8)}
    for length in range(1, 9):
        request = pb.ModelInferRequest(model_name="m" * length)
        for spec in specs:
            request.inputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
            request.raw_input_contents.append(values[spec.name].tobytes())

        parsed = envelope.parse_request(request.SerializeToString())
        arrays = read_inputs(describe_inputs(parsed.envelope.message, specs, ()), parsed.raws, Regions(enabled=False))

        assert all(array.flags.aligned for array in arrays.values())
        assert not arrays["u"].flags.owndata
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, values[name])


def test_strings_count_with_what_they_take_in_memory():
    """Each is an object of its own; a claim beyond what the message can hold counts no more than that."""
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="BYTES", shape=[10, 100])
    request.inputs.add(name="y", datatype="FP32", shape=[2**40])
    request.raw_input_contents.append(b"\2\0\0\0ab" * 1000)
    data = request.SerializeToString()

    assert envelope.parse_request(data).size == len(data) + 1000 * 400
    request.inputs[0].shape[:] = [2**40, -1]
    assert envelope.parse_request(request.SerializeToString()).size == request.ByteSize()
    request.inputs[0].shape[:] = [2**40]
    assert (
        envelope.parse_request(request.SerializeToString()).size == request.ByteSize() + request.ByteSize() // 2 * 400
    )
