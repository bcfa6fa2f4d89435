"""Every datatype of the protocol over a real socket, raw and typed: scalars, empty tensors, inputs to be left out."""

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle.errors import ModelError
from bundle.session import Session
from bundle.tensor import NUMPY_TYPES
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve.config import ServeConfig
from serve.server import start
from serve.tensors import datatype_of, from_raw, to_raw
from tests.serve_bundles import model_bytes

EXTREMES = {
    "BOOL": [True, False, True],
    **{
        name: [np.iinfo(name.lower()).min, 1, np.iinfo(name.lower()).max]
        for name in ("INT8", "INT16", "INT32", "INT64")
    },
    **{name: [0, 1, np.iinfo(name.lower()).max] for name in ("UINT8", "UINT16", "UINT32", "UINT64")},
    "FP16": [-0.0, 6e-8, np.inf],
    "FP32": [-0.0, 1e-45, np.nan],
    "FP64": [5e-324, -np.inf, np.nan],
    "BYTES": [b"", "né \0".encode(), b"x" * 300],
}
ARRAYS = {name: np.array(values, NUMPY_TYPES[name]) for name, values in EXTREMES.items()}
ARRAYS["BF16"] = np.array([0x8000, 0x0001, 0x7FC1], "<u2").view("V2")  # -0, the smallest, NaN
FIELDS = {"BOOL": "bool", "INT64": "int64", "UINT64": "uint64", "FP32": "fp32", "FP64": "fp64", "BYTES": "bytes"}
FIELDS |= dict.fromkeys(("INT8", "INT16", "INT32"), "int") | dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint")
SHAPES = {"scalar": [], "vector": [None], "matrix": [None, None]}


def kind(datatype):
    """The element type of ONNX."""
    names = {"FP16": "FLOAT16", "BF16": "BFLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}
    return getattr(TensorProto, names.get(datatype, datatype))


def echo(datatype):
    """A graph that gives back a scalar, a vector and a matrix of one type, as outputs in another order than inputs."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in SHAPES]
    given = [(name, kind(datatype), shape) for name, shape in SHAPES.items()]
    return model_bytes(nodes, given, [(f"{name}_out", each, shape) for name, each, shape in reversed(given)])


def sums():
    """x + weight + bias, of which weight and bias are initializers that a request may replace."""
    names = {"weight": np.float32([1, 2]), "bias": np.float32(10)}
    return model_bytes(
        [helper.make_node("Add", ["x", "weight"], ["sum"]), helper.make_node("Add", ["sum", "bias"], ["y"])],
        [("x", TensorProto.FLOAT, [2]), ("weight", TensorProto.FLOAT, [2]), ("bias", TensorProto.FLOAT, [])],
        [("y", TensorProto.FLOAT, [2])],
        names,
    )


def graph_of(node, given, result, constants=()):
    """A serialised graph of one node whose input and output are ValueInfoProtos."""
    graph = helper.make_graph([node], "g", [given], [result], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def presence():
    """Whether an input of an ONNX optional type was given."""
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, [None])
    given = helper.make_value_info("x", helper.make_optional_type_proto(tensor))
    result = helper.make_tensor_value_info("y", TensorProto.BOOL, [])
    return graph_of(helper.make_node("OptionalHasElement", ["x"], ["y"]), given, result)


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, data in {**{each: echo(each) for each in ARRAYS}, "sums": sums(), "presence": presence()}.items():
        (root / f"{name}.onnx").write_bytes(data)
    server = start(ServeConfig(paths=tuple(sorted(root.iterdir())), port=0, device="cpu", threads=1))
    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    server.stop(drain_s=0)


def asked(model, arrays, typed=False):
    """A request with these inputs in this order."""
    message = pb.ModelInferRequest(model_name=model)
    for name, array in arrays.items():
        datatype = datatype_of(array, name)
        tensor = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            getattr(tensor.contents, f"{FIELDS[datatype]}_contents").extend(array.ravel().tolist())
        else:
            message.raw_input_contents.append(to_raw(array, datatype))
    return message


def answers(response):
    """The arrays of a response by name."""
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {one.name: from_raw(raw, one.datatype, tuple(one.shape), one.name) for one, raw in pairs}


def same(one, other):
    """Equal in type, shape and every bit."""
    return (one.dtype, one.shape, one.tolist() if one.dtype == object else one.tobytes()) == (
        other.dtype,
        other.shape,
        other.tolist() if other.dtype == object else other.tobytes(),
    )


@pytest.mark.parametrize(
    ("datatype", "typed"), [(name, False) for name in ARRAYS] + [(name, True) for name in ARRAYS if name in FIELDS]
)
def test_every_datatype_comes_back_bit_for_bit(stub, datatype, typed):
    """Extremes, NaN, NUL; a scalar stays a scalar, an empty tensor keeps its shape; inputs come in any order."""
    values = ARRAYS[datatype]
    arrays = {"matrix": values[:0].reshape(3, 0), "scalar": values[2:].reshape(()), "vector": values}

    got = answers(stub.ModelInfer(asked(datatype, arrays, typed)))

    assert list(got) == ["matrix_out", "vector_out", "scalar_out"]
    for name, array in arrays.items():
        assert same(got[f"{name}_out"], array), name


@pytest.mark.parametrize("datatype", ARRAYS)
def test_metadata_and_configuration_name_the_datatype(stub, datatype):
    """As the protocol and Triton's configuration call it; of a scalar the shape has no axis."""
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=datatype))
    config = stub.ModelConfig(pb.ModelConfigRequest(name=datatype)).config

    assert [(one.datatype, list(one.shape)) for one in metadata.inputs] == [
        (datatype, []),
        (datatype, [-1]),
        (datatype, [-1, -1]),
    ]
    expected = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    assert {pb.DataType.Name(one.data_type) for one in (*config.input, *config.output)} == {expected}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [12, 13]),
        ({"bias": np.float32(0)}, [2, 3]),
        ({"weight": np.float32([0, 5])}, [11, 16]),
        ({"bias": np.float32(1), "weight": np.float32([0, 0])}, [2, 2]),
    ],
    ids=["none", "bias", "weight", "both"],
)
def test_an_initializer_that_is_an_input_may_be_replaced(stub, given, expected):
    """For that request alone: the next one has the graph's own values again."""
    given = {name: np.asarray(value) for name, value in given.items()}

    got = answers(stub.ModelInfer(asked("sums", {**given, "x": np.float32([1, 1])})))

    assert got["y"].tolist() == expected


def test_an_input_of_an_optional_type_may_be_left_out(stub):
    """The graph sees whether it came."""
    assert answers(stub.ModelInfer(asked("presence", {"x": np.float32([1])})))["y"].item() is True
    assert answers(stub.ModelInfer(asked("presence", {})))["y"].item() is False


def test_what_may_be_left_out_is_said(stub):
    """In the configuration, and by what is refused."""
    config = stub.ModelConfig(pb.ModelConfigRequest(name="sums")).config

    assert {one.name: one.optional for one in config.input} == {"x": False, "weight": True, "bias": True}
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(asked("sums", {"bias": np.array(1, np.float32)}))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "input 'x' is missing" in refused.value.details()


def test_typed_floats_are_read_whatever_stands_behind_them(stub):
    """Fields that the protocol does not have are ignored, wherever they stand."""
    message = asked(
        "FP32", {"scalar": np.array(1, "f4"), "vector": np.float32([2, 3]), "matrix": np.zeros((0, 2), "f4")}, True
    )
    vector = message.inputs[1]
    vector.contents.MergeFromString(b"\x98\x06\x05")  # field 99

    assert answers(stub.ModelInfer(message))["vector_out"].tolist() == [2, 3]


def outside(kind):
    """A graph that takes or gives what the protocol cannot carry."""
    declared = helper.make_tensor_value_info
    match kind:
        case "float8":
            x, y = (declared(name, TensorProto.FLOAT8E4M3FN, [2]) for name in "xy")
            return graph_of(helper.make_node("Identity", ["x"], ["y"]), x, y)
        case "int4":
            x, y = declared("x", TensorProto.INT4, [2]), declared("y", TensorProto.FLOAT, [2])
            scale = numpy_helper.from_array(np.float32(1), "s")
            return graph_of(helper.make_node("DequantizeLinear", ["x", "s"], ["y"]), x, y, [scale])
        case "sequence":
            x, y = declared("x", TensorProto.FLOAT, [2]), helper.make_tensor_sequence_value_info("y", 1, [2])
            return graph_of(helper.make_node("SequenceConstruct", ["x"], ["y"]), x, y)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("float8", r"input 'x' is of type tensor\(float8e4m3fn\), which is not supported"),
        ("int4", r"input 'x' is of type tensor\(int4\), which is not supported"),
        ("sequence", r"output 'y' is of type seq\(tensor\(float\)\), which is not supported"),
    ],
)
def test_types_outside_the_protocol_are_refused_when_loading(kind, words):
    """The message names the tensor and its type."""
    with pytest.raises(ModelError, match=words):
        Session(outside(kind), device="cpu", threads=1)


def test_text_beside_bfloat16_is_refused_when_loading():
    """The runtime's Python interface cannot be given both; the message says what to do."""
    shapes = {"x": TensorProto.STRING, "z": TensorProto.BFLOAT16}
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in shapes]
    data = model_bytes(
        nodes, [(n, each, [1]) for n, each in shapes.items()], [(f"{n}_out", each, [1]) for n, each in shapes.items()]
    )

    with pytest.raises(ModelError, match="takes 'x', of BYTES"):
        Session(data, device="cpu", threads=1)
