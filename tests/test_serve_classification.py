"""The classification extension: the highest values of an output as text, by value, index and label."""

import grpc
import numpy as np
import pytest

from bundle.errors import BadInput
from bundle.tensor import NUMPY_TYPES, TensorSpec
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve.classification import check, top_classes
from serve.config import ServeConfig
from serve.outputs import Wanted, write_answer
from serve.server import start
from serve.tensors import from_raw
from tests.serve_bundles import identity, write_text_bundle

SCORES = np.array([[0.25, 0.5, 0.125], [3, -1, 3]], np.float32)


def texts(array):
    """As they are read, not as bytes."""
    return [[each.decode() for each in row] for row in array]


def test_rows_of_a_batch_are_ranked_one_by_one():
    """Six decimals, as C's to_string writes them; of equal values the first comes first."""
    got = top_classes(SCORES, 2, batched=True)

    assert texts(got) == [["0.500000:1", "0.250000:0"], ["3.000000:0", "3.000000:2"]]


def test_without_a_batch_axis_all_values_are_one_row():
    """The index counts all of them, row by row."""
    got = top_classes(SCORES, 3, batched=False)

    assert got.shape == (3,)
    assert texts([got]) == [["3.000000:3", "3.000000:5", "0.500000:1"]]


def test_axes_behind_the_batch_are_one():
    """A picture's classes may stand on axes of length 1, or on several."""
    got = top_classes(np.arange(12).reshape(2, 3, 2), 1, batched=True)

    assert texts(got) == [["5:5"], ["11:5"]]


def test_labels_stand_behind_the_index():
    """Where there are fewer labels than classes, or one is empty, the index is the last."""
    got = top_classes(SCORES[:1], 3, ("cat", "né: 1"), batched=True)

    assert texts(got) == [["0.500000:1:né: 1", "0.250000:0:cat", "0.125000:2"]]
    assert texts(top_classes(SCORES[:1], 1, ("cat", ""), batched=True)) == [["0.500000:1"]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([2**64 - 1, 0, 2**63], np.uint64), ["18446744073709551615:0", "9223372036854775808:2", "0:1"]),
        (np.array([-(2**63), 2**63 - 1], np.int64), ["9223372036854775807:1", "-9223372036854775808:0"]),
        (np.array([-128, 127, 0], np.int8), ["127:1", "0:2", "-128:0"]),
        (np.array([1, 65504], np.float16), ["65504.000000:1", "1.000000:0"]),
        (np.array([np.nan, -np.inf, 1, np.nan, np.inf]), ["inf:4", "1.000000:2", "-inf:1", "nan:0", "nan:3"]),
        (np.array(7, np.uint8), ["7:0"]),
    ],
    ids=["uint64", "int64", "int8", "float16", "not finite", "scalar"],
)
def test_every_kind_of_number_is_ranked_as_itself(values, expected):
    """No value is converted before it is compared; NaN comes last."""
    assert texts([top_classes(values, 10, batched=False)]) == [expected]


@pytest.mark.parametrize(
    ("shape", "batched", "expected"),
    [((0, 3), True, (0, 2)), ((2, 0), True, (2, 0)), ((0,), False, (0,)), ((3,), True, (3, 1)), ((), True, (1,))],
)
def test_nothing_to_rank_keeps_its_rows(shape, batched, expected):
    """No rows, no classes, or one value a row."""
    assert top_classes(np.zeros(shape, np.float32), 2, batched=batched).shape == expected


def test_the_highest_are_those_that_sorting_gives():
    """Of many random rows, with ties."""
    values = np.random.default_rng(5).integers(0, 50, (20, 100)).astype(np.float32)
    got = top_classes(values, 7, batched=True)

    for row, ranked in zip(values, got, strict=True):
        expected = sorted(range(100), key=lambda index: (-row[index], index))[:7]
        assert [int(each.split(b":")[1]) for each in ranked] == expected


@pytest.mark.parametrize("datatype", NUMPY_TYPES)
def test_only_numbers_have_an_order(datatype):
    """Truth values, texts and BF16 are refused before anything runs."""
    spec = TensorSpec("y", datatype, (-1,))
    if datatype in ("BOOL", "BYTES", "BF16"):
        with pytest.raises(BadInput, match=f"output 'y' is {datatype}; 'classification' is expected of numbers only"):
            check(spec)
    else:
        check(spec)


def test_an_answer_holds_classes_beside_tensors():
    """Only the output that was asked for as classes is text; labels are those of its own name."""
    specs = [TensorSpec("score", "FP32", (-1, 3)), TensorSpec("size", "INT64", (-1,))]
    arrays = {"score": SCORES, "size": np.array([1, 2])}
    labels = {"score": ("a", "b", "c"), "size": ("wrong",)}

    wanted = [Wanted(specs[0], classes=1), Wanted(specs[1])]
    answer = write_answer(("m", "1"), "", wanted, {}, arrays, labels, batched=True)

    response = pb.ModelInferResponse.FromString(answer)
    score, size = response.outputs
    assert (score.datatype, list(score.shape)) == ("BYTES", [2, 1])
    assert texts(from_raw(response.raw_output_contents[0], "BYTES", (2, 1), "")) == [["0.500000:1:b"], ["3.000000:0:a"]]
    assert (size.datatype, list(size.shape)) == ("INT64", [2])
    assert response.raw_output_contents[1] == arrays["size"].tobytes()


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_text_bundle(root / "mood")
    (root / "echo.onnx").write_bytes(identity(np.float32, [None, 3]))
    server = start(ServeConfig(paths=(root / "mood", root / "echo.onnx"), port=0, device="cpu", threads=1))
    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    server.stop(drain_s=0)


def classes(count, *, unsigned=False):
    """The parameter, as one client or another sends it."""
    return pb.InferParameter(uint64_param=count) if unsigned else pb.InferParameter(int64_param=count)


@pytest.mark.parametrize("unsigned", [False, True])
def test_classes_are_asked_for_over_the_wire(stub, unsigned):
    """A graph without a known batch axis gives one row; more classes than there are is all of them."""
    request = pb.ModelInferRequest(model_name="echo", raw_input_contents=[SCORES[:1].tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    request.outputs.add(name="y").parameters["classification"].CopyFrom(classes(2**40, unsigned=unsigned))

    response = stub.ModelInfer(request)

    assert list(response.outputs[0].shape) == [3]
    got = from_raw(response.raw_output_contents[0], "BYTES", (3,), "")
    assert texts([got]) == [["0.500000:1", "0.250000:0", "0.125000:2"]]


def test_a_bundle_names_its_labels(stub):
    """The class of the highest score is the label that the bundle itself gives."""
    request = pb.ModelInferRequest(model_name="mood")
    request.inputs.add(name="text", datatype="BYTES", shape=[2, 1]).contents.bytes_contents.extend([b"good", b"bad"])
    request.outputs.add(name="score").parameters["classification"].int64_param = 1
    request.outputs.add(name="label")

    score, label = stub.ModelInfer(request).raw_output_contents

    ranked = from_raw(score, "BYTES", (2, 1), "")
    expected = from_raw(label, "BYTES", (2, 1), "")
    assert [each.split(b":", 2)[2] for [each] in ranked] == [each for [each] in expected]


def test_the_extension_is_advertised(stub):
    """Clients switch on it."""
    assert "classification" in stub.ServerMetadata(pb.ServerMetadataRequest()).extensions
