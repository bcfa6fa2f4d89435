"""What a request can get wrong: each gets its status and a message that helps, and the next good request its answer."""

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper

from bundle.log import captured
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve.config import ServeConfig
from serve.server import start
from tests.serve_bundles import identity, model_bytes, png, write_image_bundle, write_text_bundle

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
LIMIT = 1 << 20


def picker():
    """A graph that fails on some values: rows of a table by index."""
    return model_bytes(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [("x", TensorProto.INT64, [None])],
        [("y", TensorProto.FLOAT, [None])],
        {"table": np.zeros(3, np.float32)},
    )


def zeros():
    """A graph whose answer is as long as its input says."""
    return model_bytes(
        [helper.make_node("ConstantOfShape", ["x"], ["y"])],
        [("x", TensorProto.INT64, [1])],
        [("y", TensorProto.FLOAT, [None])],
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_text_bundle(root / "b" / "mood")
    write_image_bundle(root / "b" / "colour")
    graphs = {"echo": (np.float32, [None, 2]), "deep": (np.float32, [None, None]), "half": (np.float16, [2])}
    graphs |= {"words": (object, [None]), "flags": (np.bool_, [2]), "fixed": (np.float32, [2, 2])}
    for dtype in ("int8", "int16", "uint8", "uint16"):
        graphs[dtype] = (dtype, [2])
    files = []
    for name, (dtype, shape) in graphs.items():
        files.append(root / f"{name}.onnx")
        files[-1].write_bytes(identity(dtype, shape))
    brain = [("x", TensorProto.BFLOAT16, [2])], [("y", TensorProto.BFLOAT16, [2])]
    graphs = {"brain": model_bytes([helper.make_node("Identity", ["x"], ["y"])], *brain)}
    for name, data in {**graphs, "picker": picker(), "zeros": zeros()}.items():
        files.append(root / f"{name}.onnx")
        files[-1].write_bytes(data)
    config = ServeConfig(paths=(root / "b", *files), port=0, device="cpu", threads=1, max_message_bytes=LIMIT)
    server = start(config)
    yield server
    server.stop(drain_s=0)


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(model="echo", name="x", datatype="FP32", shape=(1, 2), raw=(bytes(8),), outputs=(), version="", **contents):
    """A good request to the graph `echo`, but for what the arguments change."""
    message = pb.ModelInferRequest(model_name=model, model_version=version, raw_input_contents=raw)
    tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    for output in outputs:
        message.outputs.add(name=output)
    return message


def text(*rows, shape=None):
    message = pb.ModelInferRequest(model_name="mood")
    tensor = message.inputs.add(name="text", datatype="BYTES", shape=[len(rows), 1] if shape is None else shape)
    tensor.contents.bytes_contents.extend(rows)
    return message


def with_input(message, name="x", shape=(1, 2)):
    message.inputs.add(name=name, datatype="FP32", shape=shape)
    message.raw_input_contents.append(bytes(8))
    return message


def without_inputs(model="echo"):
    return pb.ModelInferRequest(model_name=model)


def graph(ids, mask):
    message = pb.ModelInferRequest(model_name="mood.onnx")
    for name, shape in (("input_ids", ids), ("attention_mask", mask)):
        message.inputs.add(name=name, datatype="INT64", shape=shape)
        message.raw_input_contents.append(np.ones(shape, "<i8").tobytes())
    return message


def with_parameter(key, place="request", message=None, **choice):
    message = request(outputs=["y"]) if message is None else message
    target = message if place == "request" else getattr(message, f"{place}s")[0]
    target.parameters[key].CopyFrom(pb.InferParameter(**choice))
    return message


def with_parameters(place):
    message = request()
    for number in range(1025):
        with_parameter(f"mine {number}", place, message, int64_param=1)
    return message


def in_shared_memory(place="input", message=None, name="r", size=8):
    message = with_parameter("shared_memory_region", place, message, string_param=name)
    return with_parameter("shared_memory_byte_size", place, message, int64_param=size)


def classes_of(model, datatype, raw):
    message = request(model, datatype=datatype, shape=[2], raw=[raw], outputs=["y"])
    return with_parameter("classification", "output", message, int64_param=1)


ELEMENT = b"\x01\0\0\0a"

MALFORMED = {
    # names of inputs
    "no input": (without_inputs(), INVALID, "input 'x' is missing: expected 1 inputs, got 0"),
    "no input to a bundle": (without_inputs("mood"), INVALID, "input 'text' is missing"),
    "some inputs": (request("mood.onnx", "input_ids", "INT64"), INVALID, "input 'attention_mask' is missing"),
    "unknown input": (request(name="z"), INVALID, "unexpected input 'z'; the model takes 'x'"),
    "input without a name": (request(name=""), INVALID, "unexpected input ''"),
    "one input too many": (with_input(request(), "z"), INVALID, "unexpected input 'z'"),
    "the same input twice": (with_input(request()), INVALID, "input 'x' is given 2 times; expected once"),
    "NUL in an input name": (request(name="x\0"), INVALID, r"unexpected input 'x\x00'"),
    # datatype and shape
    "other datatype": (request(datatype="INT32"), INVALID, "input 'x' has datatype 'INT32'; expected FP32"),
    "no datatype": (request(datatype=""), INVALID, "input 'x' has datatype ''; expected FP32"),
    "unknown datatype": (request(datatype="FP8"), INVALID, "input 'x' has datatype 'FP8'; expected FP32"),
    "too many bytes of BF16": (
        request("brain", datatype="BF16", shape=[2], raw=[bytes(8)]),
        INVALID,
        "input 'x' has 8 raw bytes; expected 4 for BF16 [2]",
    ),
    "lower case": (request(datatype="fp32"), INVALID, "input 'x' has datatype 'fp32'; expected FP32"),
    "no shape": (request(shape=()), INVALID, "input 'x' has shape []; expected [-1, 2]"),
    "no shape for a batch": (text(b"good", shape=[]), INVALID, "input 'text' has shape []; expected [-1, 1]"),
    "rank too small": (request(shape=[2]), INVALID, "input 'x' has shape [2]; expected [-1, 2]"),
    "rank too large": (request(shape=[1, 1, 2]), INVALID, "input 'x' has shape [1, 1, 2]; expected [-1, 2]"),
    "other length": (request(shape=[1, 3]), INVALID, "input 'x' has shape [1, 3]; expected [-1, 2]"),
    "other fixed length": (request("fixed"), INVALID, "input 'x' has shape [1, 2]; expected [2, 2]"),
    "-1 in a request": (request(shape=[-1, 2]), INVALID, "input 'x' has shape [-1, 2]; expected no negative length"),
    "negative and positive": (request("deep", shape=[2, -5]), INVALID, "expected no negative length"),
    "negative length": (request(shape=[-5, 2]), INVALID, "input 'x' has shape [-5, 2]; expected no negative length"),
    "two negative lengths": (request("deep", shape=[-1, -2]), INVALID, "expected no negative length"),
    "2^64 + 32 bytes": (request("deep", shape=[2**4, 2**60 + 2]), INVALID, "expected at most 2147483647"),
    "2^64 elements": (request("deep", shape=[2**32, 2**32]), INVALID, f"which is {2**66} bytes"),
    "2^66 bytes": (request("deep", shape=[2**62, 4]), INVALID, "expected at most"),
    "huge beside nothing": (request("deep", shape=[0, 2**62], raw=[b""]), INVALID, "expected at most"),
    "rows differ": (graph([2, 3], [1, 3]), INVALID, "rows: 'input_ids' has 2, 'attention_mask' has 1"),
    "too many rows": (graph([1025, 1], [1025, 1]), INVALID, "'input_ids' has 1025 rows; expected at most 1024"),
    "too many examples": (text(*[b"good"] * 1025), INVALID, "'text' has 1025 rows; expected at most 1024"),
    "examples without batch axis": (text(b"good", shape=[1]), INVALID, "'text' has shape [1]; expected [-1, 1]"),
    "two texts in a row": (text(b"a", b"b", shape=[1, 2]), INVALID, "'text' has shape [1, 2]; expected [-1, 1]"),
    # raw contents
    "no data": (request(raw=()), INVALID, "input 'x' has 0 elements in fp32_contents; expected 2"),
    "too few bytes": (request(raw=[bytes(7)]), INVALID, "input 'x' has 7 raw bytes; expected 8 for FP32 [1, 2]"),
    "too many bytes": (request(raw=[bytes(12)]), INVALID, "input 'x' has 12 raw bytes; expected 8"),
    "empty entry": (request(raw=[b""]), INVALID, "input 'x' has 0 raw bytes; expected 8"),
    "extra entry": (request(raw=[bytes(8), b""]), INVALID, "raw_input_contents has 2 entries for 1 inputs"),
    "raw and typed": (request(fp32_contents=[1, 2]), INVALID, "input 'x' has contents, but the request has raw_input"),
    "BOOL of 2": (request("flags", datatype="BOOL", shape=[2], raw=[b"\1\2"]), INVALID, "BOOL bytes other than 0"),
    # BYTES
    "too few elements": (
        request("words", datatype="BYTES", shape=[2], raw=[ELEMENT]),
        INVALID,
        "input 'x' has 1 BYTES elements; expected 2 for shape [2]",
    ),
    "too many elements": (
        request("words", datatype="BYTES", shape=[1], raw=[ELEMENT * 2]),
        INVALID,
        "input 'x' has more than the 1 BYTES elements that shape [1] expects",
    ),
    "bytes without elements": (
        request("words", datatype="BYTES", shape=[0], raw=[ELEMENT]),
        INVALID,
        "more than the 0 BYTES elements",
    ),
    "cut length": (
        request("words", datatype="BYTES", shape=[2], raw=[ELEMENT + b"\1\0"]),
        INVALID,
        "input 'x' is cut off in BYTES element 1; expected 2 whole ones",
    ),
    "cut element": (
        request("words", datatype="BYTES", shape=[1], raw=[b"\2\0\0\0a"]),
        INVALID,
        "input 'x' is cut off in BYTES element 0",
    ),
    "length of 4 GiB": (
        request("words", datatype="BYTES", shape=[1], raw=[b"\xff\xff\xff\xffa"]),
        INVALID,
        "input 'x' is cut off in BYTES element 0",
    ),
    "not UTF-8 for a graph": (
        request("words", datatype="BYTES", shape=[2], raw=(), bytes_contents=[b"a", b"\xff"]),
        INVALID,
        "input 'x', element [1]: expected UTF-8",
    ),
    # typed contents
    "other field": (request(raw=(), int_contents=[1, 2]), INVALID, "has int_contents; expected fp32_contents for FP32"),
    "two fields": (request(raw=(), fp32_contents=[1, 2], bool_contents=[True]), INVALID, "has bool_contents; expected"),
    "too few typed": (request(raw=(), fp32_contents=[1]), INVALID, "has 1 elements in fp32_contents; expected 2"),
    "too many typed": (request(raw=(), fp32_contents=[1, 2, 3]), INVALID, "has 3 elements in fp32_contents; expected"),
    "typed BF16": (
        request("brain", datatype="BF16", shape=[2], raw=(), fp32_contents=[1, 2]),
        INVALID,
        "input 'x' has datatype BF16, which is expected in raw_input_contents only",
    ),
    "typed FP16": (
        request("half", datatype="FP16", shape=[2], raw=(), fp32_contents=[1, 2]),
        INVALID,
        "input 'x' has datatype FP16, which is expected in raw_input_contents only",
    ),
    **{
        f"{value} as {name}": (
            request(name, datatype=name.upper(), shape=[2], raw=(), **{field: [0, value]}),
            INVALID,
            f"input 'x' has the element {value}; expected {np.iinfo(name).min} to {np.iinfo(name).max}",
        )
        for name, field, value in [
            ("int8", "int_contents", 128),
            ("int8", "int_contents", -129),
            ("int16", "int_contents", 2**15),
            ("uint8", "uint_contents", 256),
            ("uint16", "uint_contents", 2**16),
        ]
    },
    # examples
    "text that is not UTF-8": (text(b"good", b"ok", b"\xff"), INVALID, "input 'text', example 2: text is not UTF-8"),
    "text that is too long": (text(b"x" * 1001), INVALID, "input 'text', example 0: text has 1001 bytes; the limit"),
    "no image": (
        request("colour", "photo", "BYTES", [2, 1], (), bytes_contents=[png("red"), b"GIF89a"]),
        INVALID,
        "input 'photo', example 1: not a",
    ),
    "cut image": (
        request("colour", "photo", "BYTES", [1, 1], (), bytes_contents=[png("red")[:60]]),
        INVALID,
        "input 'photo', example 0: ",
    ),
    # outputs
    "unknown output": (request(outputs=["z"]), INVALID, "unexpected output 'z'; the model gives 'y'"),
    "output without a name": (request(outputs=[""]), INVALID, "unexpected output ''"),
    "the same output twice": (request(outputs=["y", "y"]), INVALID, "output 'y' already exists in request"),
    # models and versions
    "unknown model": (request("other"), grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'other' is not found"),
    "no model name": (request(""), grpc.StatusCode.NOT_FOUND, "Request for unknown model: '' is not found"),
    **{
        f"model {name!r}": (request(name), grpc.StatusCode.NOT_FOUND, f"unknown model: {name!r} is not found")
        for name in ("../etc", "b/../echo", "/etc/passwd", "echo/1", "b/mood", " ..", " ", "echo ", "echo.onnx", "Echo")
    },
    "other version": (request(version="2"), grpc.StatusCode.NOT_FOUND, "'echo' version 2 is not found"),
    **{
        f"version {version!r}": (request(version=version), INVALID, f"specified version string {version!r}")
        for version in ("abc", "-1", "0", "01", "1.0", " 1", "+1", "1/../1", "9" * 19, "\u0661")
    },
    "NUL in the model name": (request("echo\0x"), INVALID, r"model name 'echo\x00x' holds a NUL character"),
    "NUL in the version": (request(version="1\0"), INVALID, r"specified version string '1\x00'"),
    # parameters
    "reserved parameter": (with_parameter("triton_x", bool_param=True), INVALID, "parameter 'triton_x' is reserved"),
    "parameter without value": (with_parameter("mine"), INVALID, "parameter 'mine' has no value"),
    "input parameter without value": (
        with_parameter("mine", "input"),
        INVALID,
        "input 'x': parameter 'mine' has no value",
    ),
    "priority of another type": (
        with_parameter("priority", string_param="1"),
        INVALID,
        "parameter 'priority' is a string_param; expected int64_param or uint64_param",
    ),
    "negative priority": (with_parameter("priority", int64_param=-1), INVALID, "'priority' is -1; expected no"),
    "timeout of another type": (with_parameter("timeout", double_param=1.0), INVALID, "'timeout' is a double_param"),
    "negative timeout": (with_parameter("timeout", int64_param=-1), INVALID, "'timeout' is -1; expected no negative"),
    "final response of another type": (
        with_parameter("triton_enable_empty_final_response", int64_param=1),
        INVALID,
        "is a int64_param; expected bool_param",
    ),
    "sequence id of another type": (with_parameter("sequence_id", bool_param=True), INVALID, "'sequence_id' is a bool"),
    "sequence": (with_parameter("sequence_id", int64_param=7), UNIMPLEMENTED, "sequences are not supported"),
    "named sequence": (with_parameter("sequence_id", string_param="s"), UNIMPLEMENTED, "sequences are not supported"),
    "start of a sequence": (with_parameter("sequence_start", bool_param=True), UNIMPLEMENTED, "'sequence_start'"),
    "shared memory without its size": (
        with_parameter("shared_memory_region", "input", string_param="r"),
        INVALID,
        "input 'x' has parameter 'shared_memory_region'; expected 'shared_memory_byte_size' beside it",
    ),
    "offset without shared memory": (
        with_parameter("shared_memory_offset", "output", int64_param=2**63 - 1),
        INVALID,
        "output 'y' has parameter 'shared_memory_offset'; expected it beside 'shared_memory_region' only",
    ),
    "region that is no name": (
        with_parameter("shared_memory_region", "input", int64_param=1),
        INVALID,
        "input 'x': parameter 'shared_memory_region' is a int64_param; expected string_param",
    ),
    "negative size of shared memory": (
        in_shared_memory(size=-8),
        INVALID,
        "input 'x': parameter 'shared_memory_byte_size' is -8; expected no negative number",
    ),
    "negative offset in shared memory": (
        with_parameter("shared_memory_offset", "output", in_shared_memory("output"), int64_param=-1),
        INVALID,
        "output 'y': parameter 'shared_memory_offset' is -1; expected no negative number",
    ),
    "bytes and shared memory": (
        in_shared_memory(),
        INVALID,
        "raw_input_contents has 1 entries for 0 inputs outside shared memory",
    ),
    "contents and shared memory": (
        in_shared_memory(message=request(raw=(), fp32_contents=[1, 2])),
        INVALID,
        "input 'x' has contents, but it is in shared memory",
    ),
    "shared memory that is off, in": (in_shared_memory(message=request(raw=())), UNIMPLEMENTED, "memory is disabled"),
    "shared memory that is off, out": (in_shared_memory("output"), UNIMPLEMENTED, "shared memory is disabled"),
    "classes in shared memory": (
        with_parameter("classification", "output", in_shared_memory("output"), int64_param=1),
        INVALID,
        "output 'y' has 'classification' and 'shared_memory_region'; expected one of them",
    ),
    "no classes": (
        with_parameter("classification", "output", int64_param=0),
        INVALID,
        "output 'y' has parameter 'classification' 0; expected a positive number",
    ),
    "negative classes": (
        with_parameter("classification", "output", int64_param=-1),
        INVALID,
        "output 'y': parameter 'classification' is -1; expected no negative number",
    ),
    "classes that are no number": (
        with_parameter("classification", "output", string_param="1"),
        INVALID,
        "output 'y': parameter 'classification' is a string_param; expected int64_param or uint64_param",
    ),
    "classes of an input": (
        with_parameter("classification", "input", int64_param=1),
        INVALID,
        "input 'x' has parameter 'classification', which is expected of outputs only",
    ),
    "classes of truth values": (classes_of("flags", "BOOL", b"\0\1"), INVALID, "output 'y' is BOOL; 'classification'"),
    "classes of texts": (classes_of("words", "BYTES", ELEMENT * 2), INVALID, "output 'y' is BYTES; 'classification'"),
    "tensors without end": (request(raw=[b""] * 5000), INVALID, "more than 4096 tensors and parameters"),
    "parameters without end": (
        with_parameters("input"),
        INVALID,
        "input 'x' has 1025 parameters; expected at most 1024",
    ),
    "request parameters without end": (
        with_parameters("request"),
        INVALID,
        "the request has 1025 parameters; expected at most 1024",
    ),
    "axes without end": (
        request(shape=[1] * 65),
        INVALID,
        "input 'x' has 65 axes; expected [-1, 2]",
    ),
    "output parameter without value": (
        with_parameter("mine", "output"),
        INVALID,
        "output 'y': parameter 'mine' has no value",
    ),
}  # fmt: skip


def refusal(call, message):
    with pytest.raises(grpc.RpcError) as refused:
        call(message)
    return refused.value.code(), refused.value.details()


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_told_what_is_wrong_and_harms_nobody(stub, case):
    """Its status and message are those of docs/protocol.md, and the next request is answered."""
    message, expected, words = MALFORMED[case]

    code, details = refusal(stub.ModelInfer, message)

    assert code is expected, details
    assert words in details
    assert stub.ModelInfer(request()).outputs[0].name == "y"


@pytest.mark.parametrize(
    ("call", "ask"), [("ModelMetadata", pb.ModelMetadataRequest), ("ModelConfig", pb.ModelConfigRequest)]
)
@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [("other", "", "NOT_FOUND"), ("echo", "2", "NOT_FOUND"), ("echo", "x", "INVALID_ARGUMENT")],
)
def test_questions_about_what_is_not_served_have_the_same_status(stub, call, ask, name, version, expected):
    """Metadata and configuration answer as inference does."""
    assert refusal(getattr(stub, call), ask(name=name, version=version))[0].name == expected


def test_model_ready_of_an_impossible_version_is_invalid(stub):
    """It is no version that could be ready some day."""
    assert refusal(stub.ModelReady, pb.ModelReadyRequest(name="echo", version="x"))[0] is INVALID


def test_a_message_over_the_limit_is_refused(stub):
    """RESOURCE_EXHAUSTED, before anything of it is decoded."""
    code, _ = refusal(stub.ModelInfer, request(raw=[bytes(LIMIT)]))

    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.ModelInfer(request()).outputs[0].name == "y"


def test_a_long_name_does_not_break_the_answer(stub):
    """Details travel in headers, which are short: the message is cut, the status stays."""
    code, details = refusal(stub.ModelInfer, request(name="é" * 100_000))

    assert code is INVALID
    assert details.startswith("unexpected input 'éé")
    assert len(details) == 500


def test_bytes_that_are_no_message_are_refused(server):
    """What cannot be parsed is a bad request like others, on a stream as well, and harms nobody."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([b"\xff\xff\xff"]))

        assert refusal(call, b"\xff\xff\xff")[0] is INVALID
        with pytest.raises(grpc.RpcError) as refused:
            next(stream)
        assert refused.value.code() is INVALID
        assert inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request()).model_name == "echo"


def test_what_was_not_foreseen_is_told_by_an_id_only(stub):
    """The runtime's words stay in the log, under the id that the client gets."""
    message = request("picker", datatype="INT64", shape=[1], raw=[np.int64(99).tobytes()])

    with captured() as logs:
        code, details = refusal(stub.ModelInfer, message)

    assert code is grpc.StatusCode.INTERNAL
    [entry] = [entry for entry in logs if entry["event"] == "call failed"]
    assert details == f"internal error {entry['id']}; the server's log has its cause under this id."
    assert "indices element out of data bounds" in str(entry["exc_info"])
    assert stub.ModelInfer(request()).outputs[0].name == "y"


def test_an_answer_over_the_limit_is_an_error(stub):
    """A small request whose answer would not fit is refused, and harms nobody."""
    code, _ = refusal(stub.ModelInfer, request("zeros", datatype="INT64", shape=[1], raw=[np.int64(LIMIT).tobytes()]))

    assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
    assert stub.ModelInfer(request()).outputs[0].name == "y"
