import numpy as np
import pytest

from bundle import preprocess, tensors
from bundle.errors import BadInput
from bundle.manifest import MAX_TENSOR_BYTES, NamedTensor, TensorsInput
from bundle.tensor import NUMPY_TYPES, TensorSpec

DATATYPES = [datatype for datatype in NUMPY_TYPES if datatype not in ("BYTES", "BF16")]


def spec(**named):
    return TensorsInput(
        tensors=tuple(
            NamedTensor(name=name, datatype=datatype, shape=shape) for name, (datatype, shape) in named.items()
        )
    )


SPEC = spec(flag=("BOOL", (3,)), size=("FP32", ()), grid=("INT64", (2, 2)), half=("FP16", (1,)))
ARRAYS = {
    "flag": np.array([[True, False, True], [False, False, False]]),
    "size": np.array([-0.0, 1e-45], "<f4"),
    "grid": np.array([[[1, 2], [3, 4]], [[-(2**63), 2**63 - 1], [0, -1]]], "<i8"),
    "half": np.array([[65504], [-1.5]], "<f2"),
}


def test_examples_come_back_bit_for_bit():
    """Tensors of several types, with and without axes, survive the way into bytes and out of them."""
    raws = preprocess.raw_examples(SPEC, ARRAYS)
    encode = preprocess.encoder(SPEC, {}.__getitem__)
    batch = preprocess.collate([encode(raw) for raw in raws], SPEC)

    assert list(batch) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert batch[name].dtype == array.dtype
        assert batch[name].flags.c_contiguous
        assert batch[name].shape == array.shape
        assert batch[name].tobytes() == array.tobytes()


def test_raw_bytes_are_the_tensors_one_after_the_other():
    """Packed, little-endian, row-major, in the order of the manifest."""
    raw = preprocess.raw_examples(SPEC, {**ARRAYS, "grid": np.asfortranarray(ARRAYS["grid"]).astype(">i8")})[0]

    assert raw == bytes([1, 0, 1]) + b"\0\0\0\x80" + np.array([1, 2, 3, 4], "<i8").tobytes() + b"\xff\x7b"


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_of_the_protocol_but_bytes_is_taken(datatype):
    """Graph and wire see it under its own name, with the batch axis first."""
    one = spec(x=(datatype, (2, 3)))
    values = np.arange(12).reshape(2, 2, 3).astype(NUMPY_TYPES[datatype])
    rows = [tensors.decode(raw, one) for raw in tensors.encode({"x": values}, one)]

    np.testing.assert_array_equal(tensors.collate(rows, one)["x"], values)
    assert preprocess.graph_inputs(one) == preprocess.wire_inputs(one) == (TensorSpec("x", datatype, (-1, 2, 3)),)
    assert not preprocess.is_sequence(one)
    assert preprocess.length(rows[0], one) == 1


@pytest.mark.parametrize("size", [0, 40, 42])
def test_another_number_of_bytes_is_refused(size):
    """Both sizes and the tensors are named."""
    with pytest.raises(
        BadInput, match=rf"tensors have {size} bytes; expected 41, 'flag' BOOL \[3\] and 'size' FP32 \[\]"
    ):
        tensors.decode(b"\0" * size, SPEC)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("datatype", "shape"), [("FP16", (2, 3)), ("FP32", (2, 3)), ("FP64", (2, 3)), ("FP32", ())])
def test_what_is_not_finite_is_refused(datatype, shape, value):
    """The first such element is named."""
    values = np.zeros((1, *shape), NUMPY_TYPES[datatype])
    values[(0, *(1 for _ in shape))] = value
    one = spec(x=(datatype, shape))
    (raw,) = tensors.encode({"x": values}, one)

    with pytest.raises(BadInput) as refused:
        tensors.decode(raw, one)
    assert str(refused.value) == f"tensor 'x' is not finite: element {[1 for _ in shape]} is {value}."


def test_a_truth_value_is_0_or_1():
    """Any other byte would be true to one reader and something else to the next."""
    with pytest.raises(BadInput, match=r"tensor 'x' holds a byte that is neither 0 nor 1: element \[1, 0\]"):
        tensors.decode(b"\1\0\2\1", spec(x=("BOOL", (2, 2))))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"name": ""}, "must have a name"),
        ({"shape": (3, 0)}, "of a positive length"),
        ({"shape": (-1,)}, "of a positive length"),
        ({"shape": (1,) * 17}, "at most 16 axes"),
    ],
)
def test_impossible_tensors_are_refused(tensor, words):
    """Names are not empty, sizes are fixed."""
    with pytest.raises(ValueError, match=words):
        NamedTensor(**{"name": "x", "datatype": "FP32", "shape": (3,), **tensor})


@pytest.mark.parametrize(
    ("of", "words"),
    [
        ((), "there must be a tensor"),
        ((NamedTensor(name="x", datatype="FP32", shape=(1,)),) * 2, "each must have its own name"),
        (
            (NamedTensor(name="x", datatype="FP64", shape=(MAX_TENSOR_BYTES // 8 + 1,)),),
            "67108872 bytes; at most 67108864",
        ),
        ((NamedTensor(name="x", datatype="FP32", shape=(10**9,) * 16),), "are allowed"),
    ],
)
def test_impossible_inputs_are_refused(of, words):
    """There is a tensor, no two have one name, and an example fits into a message."""
    with pytest.raises(ValueError, match=words):
        TensorsInput(tensors=of)
