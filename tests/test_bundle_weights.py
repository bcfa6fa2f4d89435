import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle.errors import ModelError
from bundle.session import Session
from bundle.weights import SMALLEST, without_weights

NAME = "place"
LARGE = SMALLEST  # elements: of every dtype more than SMALLEST bytes, or as many


def model(weights, nodes=None, outputs=None):
    """A serialised model that gives each weight back under the name NAME_out."""
    nodes = nodes or [helper.make_node("Identity", [name], [f"{name}_out"]) for name in weights]
    outputs = outputs or [
        helper.make_tensor_value_info(f"{name}_out", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in weights.items()
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", [], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def some(dtype, count):
    return np.random.default_rng(0).integers(0, 100, count).astype(dtype)


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])
def test_weights_of_every_type_come_back(dtype):
    """Whatever its type and wherever it lies, a weight that was taken out is the weight that runs."""
    weights = {"odd": some("u1", LARGE + 1), "w": some(dtype, LARGE), "last": some(dtype, LARGE)}
    data = model(weights)

    assert len(without_weights(data, NAME)) < 1000
    got = Session(data, device="cpu", threads=1).run({})
    for name, value in weights.items():
        np.testing.assert_array_equal(got[f"{name}_out"], value)


def test_graph_is_otherwise_the_same():
    """All but the data of the large weights is there as before."""
    data = model({"large": some("f4", LARGE), "small": some("f4", 3), "scalar": np.float32(2)[()].reshape(())})
    before, after = onnx.load_from_string(data), onnx.load_from_string(without_weights(data, NAME))

    large = after.graph.initializer[0]
    where = {each.key: each.value for each in large.external_data}
    assert where["location"] == NAME
    assert large.data_location == TensorProto.EXTERNAL
    start, size = int(where["offset"]), int(where["length"])
    assert data[start : start + size] == before.graph.initializer[0].raw_data
    large.CopyFrom(before.graph.initializer[0])
    assert after == before


def test_model_without_large_weights_stays_as_it_is():
    """Where there is nothing to take out, the same bytes come back."""
    data = model({"w": some("f4", 8)})

    assert without_weights(data, NAME) == data


def test_session_does_not_keep_the_model():
    """A session holds its weights once: the bytes that it was made of can go."""
    data = model({"w": some("f4", LARGE)})
    before = sys.getrefcount(data)
    session = Session(data, device="cpu", threads=1)

    assert sys.getrefcount(data) == before
    assert session.run({})["w_out"].size == LARGE


def outside(location):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[LARGE], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": str(4 * LARGE)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_weight_that_lies_elsewhere_is_refused():
    """A model holds its weights, and cannot take others of its bytes for one."""
    loaded = onnx.load_from_string(model({"w": some("f4", LARGE)}))
    loaded.graph.initializer[0].CopyFrom(outside(NAME))

    with pytest.raises(ModelError, match="does not hold its weights"):
        without_weights(loaded.SerializeToString(), NAME)


@pytest.mark.parametrize("size", [2, LARGE])
def test_weight_that_is_listed_twice_is_refused(size):
    """The runtime would take the first of large ones and the last of small ones."""
    loaded = onnx.load_from_string(model({"w": some("f4", size)}))
    loaded.graph.initializer.append(loaded.graph.initializer[0])

    with pytest.raises(ModelError, match="lists weight 'w' more than once"):
        Session(loaded.SerializeToString(), device="cpu", threads=1)


def test_place_of_the_weights_cannot_be_named(monkeypatch):
    """Each session gives the place where the weights lie a name of its own, which no model can have in it."""
    names = []

    def spy(data, name):
        names.append(name)
        return without_weights(data, name)

    monkeypatch.setattr("bundle.weights.without_weights", spy)
    for _ in range(2):
        Session(model({"w": some("f4", LARGE)}), device="cpu", threads=1)

    assert len(set(names)) == 2
    assert min(map(len, names)) == 32


def cut(data):
    return data[:-1]


def endless_number(data):
    return b"\xff" * 10_000 + data


def unknown_kind(data):
    return b"\x0b" + data  # a group, which protobuf has given up


def too_long(data):
    return data + b"\x3a\x7f"  # a graph of 127 bytes, and none follows


@pytest.mark.parametrize("damage", [cut, endless_number, unknown_kind, too_long])
def test_damaged_bytes_are_refused(damage):
    """Bytes that are no model are an error of ours, whatever is wrong with them."""
    with pytest.raises(ModelError, match="cannot load the graph"):
        without_weights(damage(model({"w": some("f4", LARGE)})), NAME)


def test_any_bytes_are_a_model_or_refused():
    """No input makes it fail otherwise."""
    random = np.random.default_rng(0)
    data = bytearray(model({"w": some("i1", LARGE), "v": some("f4", 2)}))
    for _ in range(300):
        changed = bytearray(data)
        for at in random.integers(0, 200, 3):
            changed[at] = random.integers(256)
        try:
            without_weights(bytes(changed), NAME)
        except ModelError:
            continue
