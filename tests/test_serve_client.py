"""The client: one exception class, one look-up of the input, arrays in and out."""

import grpc
import numpy as np
import pytest

from bundle.errors import BadInput, EdgewardError
from bundle.tensor import TensorSpec
from serve.client import Client
from serve.errors import ServerError
from serve.config import ServeConfig
from serve.server import start
from tests.serve_bundles import identity, png, write_image_bundle, write_text_bundle


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_text_bundle(root / "b" / "mood")
    write_image_bundle(root / "b" / "colour")
    (root / "echo.onnx").write_bytes(identity(np.float32, [None, 2]))
    server = start(ServeConfig(paths=(root / "b", root / "echo.onnx"), port=0, device="cpu", threads=1))
    yield server
    server.stop(drain_s=0)


@pytest.fixture(scope="module")
def client(server):
    with Client(server.address) as client:
        yield client


def test_ready_is_false_where_nobody_answers(server):
    """A server that is not there is not ready, which is no error."""
    with Client(server.address) as client:
        assert client.ready()
    with Client("127.0.0.1:1", timeout_s=30) as client:
        assert not client.ready()


def test_metadata_is_read_into_our_own_types(client):
    """Names, integer versions, specs."""
    metadata = client.metadata("colour")

    assert (metadata.name, metadata.versions, metadata.platform) == ("colour", (1,), "edgeward_bundle")
    assert metadata.inputs == (TensorSpec("photo", "BYTES", (-1, 1)),)
    assert metadata.outputs[1] == TensorSpec("score", "FP32", (-1, 2))


def test_texts_may_be_str_or_bytes(client):
    """A str is sent as its UTF-8."""
    answer = client.predict("mood", ["né good", "né good".encode()])

    assert answer["label"].shape == (2, 1)
    np.testing.assert_array_equal(answer["logits"][0], answer["logits"][1])


def test_images_are_sent_as_they_are(client):
    """The input's name comes from the model's metadata."""
    assert client.predict("colour", [png("red"), png("blue")])["label"].shape == (2, 1)


def test_predict_of_a_graph_points_to_infer(client):
    """A model that takes tensors cannot be given raw examples."""
    with pytest.raises(BadInput, match=r"takes no raw examples but 'x' FP32 \[-1, 2\]"):
        client.predict("echo", ["text"])


@pytest.mark.parametrize(
    "array", [np.array([["a", "é"]]), np.array([[b"a", "é".encode()]]), np.array([["a", b"b"]], object)]
)
def test_texts_of_any_numpy_kind_are_bytes_on_the_wire(client, array):
    """The server then says what it expected."""
    with pytest.raises(ServerError, match="datatype 'BYTES'; expected FP32"):
        client.infer("echo", {"x": array})


def test_byte_order_and_layout_do_not_matter(client):
    """Arrays are sent little-endian and row-major, whatever they are in memory."""
    array = np.arange(6, dtype=">f4").reshape(2, 3).T

    np.testing.assert_array_equal(client.infer("echo", {"x": array})["y"], array)


def test_a_dtype_that_the_protocol_lacks_is_bad_input(client):
    """Before anything is sent."""
    with pytest.raises(BadInput, match="complex64"):
        client.infer("echo", {"x": np.zeros((1, 2), np.complex64)})


def test_a_refusal_is_one_exception_with_status_and_details(client, server):
    """One line for people, two attributes for programs."""
    with pytest.raises(ServerError) as refused:
        client.predict("other", ["text"])

    assert isinstance(refused.value, EdgewardError)
    assert refused.value.code is grpc.StatusCode.NOT_FOUND
    assert refused.value.details == "Request for unknown model: 'other' is not found"
    assert str(refused.value) == f"{server.address} answered NOT_FOUND: {refused.value.details}"


def test_no_server_is_the_same_exception():
    """UNAVAILABLE, with gRPC's own words."""
    with Client("127.0.0.1:1") as client, pytest.raises(ServerError) as refused:
        client.predict("mood", ["text"])

    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
