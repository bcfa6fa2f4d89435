import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle.errors import DeviceUnavailable, EdgewardError, ModelError
from bundle.host import cpu_count
from bundle.session import Session, optimized
from bundle.tensor import TensorSpec

CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/dev/nvidiactl").exists()
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def graph(initializers=None, nodes=None, inputs=None, outputs=None):
    """By default logits (N, 3) = x (N, 4) @ WEIGHTS."""
    made = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "test",
        inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        outputs or [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(WEIGHTS, "w")] if initializers is None else initializers,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def session():
    return Session(graph(), device="cpu", threads=2)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_run_gives_outputs_by_name(session, rows):
    """Any number of rows goes in, and comes out under the graph's names."""
    x = np.random.default_rng(1).normal(size=(rows, 4)).astype(np.float32)
    got = session.run({"x": x})

    assert set(got) == {"logits"}
    np.testing.assert_allclose(got["logits"], x @ WEIGHTS, atol=1e-5)


def test_arrays_with_gaps_are_taken(session):
    """A view with strides gives what its copy gives."""
    x = np.random.default_rng(2).normal(size=(6, 8)).astype(np.float32)[::2, ::2]

    np.testing.assert_array_equal(session.run({"x": x})["logits"], session.run({"x": x.copy()})["logits"])


def test_session_says_what_it_takes_and_gives(session):
    """Names, types and shapes are in the words of the protocol; free axes are -1."""
    assert session.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert session.outputs == (TensorSpec("logits", "FP32", (-1, 3)),)
    assert session.device == "cpu"


def test_threads_are_the_cores_by_default():
    """A session takes the cores that the process may use, unless told otherwise."""
    assert Session(graph(), device="cpu").threads == cpu_count()
    assert Session(graph(), device="cpu", threads=1).threads == 1


@pytest.mark.parametrize("optimize", [True, False])
def test_unoptimised_graph_gives_the_same(session, optimize):
    """Switching the optimiser off is for finding faults, and changes no contract."""
    x = np.ones((2, 4), np.float32)

    got = Session(graph(), device="cpu", threads=1, optimize=optimize).run({"x": x})
    np.testing.assert_allclose(got["logits"], session.run({"x": x})["logits"], atol=1e-6)


@pytest.mark.parametrize("data", [b"", b"not a graph", graph()[:-20], os.urandom(1000)], ids=range(4))
def test_invalid_graph_is_refused(data):
    """Bytes that the runtime cannot load are a ModelError, whatever they are."""
    with pytest.raises(ModelError, match="cannot load the graph"):
        Session(data, device="cpu")


def test_refusal_is_one_error_and_no_noise(session, capfd):
    """What went wrong is in the error; the runtime writes nothing of its own."""
    with pytest.raises(ModelError):
        Session(b"not a graph", device="cpu")
    with pytest.raises(ModelError):
        session.run({"x": np.ones((1, 5), np.float32)})

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"y": np.ones((1, 4), np.float32)},
        {"x": np.ones((1, 4), np.float32), "y": np.ones((1, 4), np.float32)},
        {"x": np.ones((1, 5), np.float32)},
        {"x": np.ones((4,), np.float32)},
        {"x": np.ones((1, 4), np.float64)},
        {"x": np.array([[b"a", b"b", b"c", b"d"]], dtype=object)},
    ],
    ids=["nothing", "other name", "one too many", "other width", "other rank", "other type", "strings"],
)
def test_wrong_feeds_are_refused(session, feeds):
    """Names, shapes and types that the graph does not take are a ModelError, and the session goes on."""
    with pytest.raises(ModelError, match="ONNX Runtime failed"):
        session.run(feeds)

    assert session.run({"x": np.ones((1, 4), np.float32)})["logits"].shape == (1, 3)


def test_type_outside_the_protocol_is_refused():
    """A graph that gives what no protocol message can carry is not started."""
    value = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, ["N", 4])
    data = graph([], [helper.make_node("SequenceConstruct", ["x"], ["y"])], outputs=[value])

    with pytest.raises(ModelError, match=r"output 'y' is of type seq\(tensor\(float\)\), which is not supported"):
        Session(data, device="cpu")


@pytest.mark.parametrize("name", [b"NAME_OF_INPUT", b"NAME_OF_OUTPUT", b"NAME_OF_AXIS"])
def test_names_that_no_message_can_hold_are_refused(name):
    """ONNX Runtime takes any bytes for a name; the protocol takes UTF-8."""
    data = graph(
        [],
        [helper.make_node("Identity", ["NAME_OF_INPUT"], ["NAME_OF_OUTPUT"])],
        [helper.make_tensor_value_info("NAME_OF_INPUT", TensorProto.FLOAT, ["NAME_OF_AXIS"])],
        [helper.make_tensor_value_info("NAME_OF_OUTPUT", TensorProto.FLOAT, ["NAME_OF_AXIS"])],
    )

    assert Session(data, device="cpu")
    with pytest.raises(ModelError, match="a name that is not UTF-8"):
        Session(data.replace(name, b"\xff" * len(name)), device="cpu")


@pytest.mark.parametrize("axes", [64, 65])
@pytest.mark.parametrize("side", ["input", "output"])
def test_as_many_axes_as_arrays_have_are_taken(side, axes):
    """A tensor of more could be neither given nor had."""
    shapes = {"input": ["N"], "output": [1] * 3} | {side: [1] * axes}
    data = graph(
        [numpy_helper.from_array(np.ones(len(shapes["output"]), np.int64), "shape")],
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shapes["input"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["output"])],
    )

    if axes == 64:
        assert Session(data, device="cpu")
    else:
        with pytest.raises(ModelError, match=f"{side} '[xy]' has 65 axes; tensors have at most 64"):
            Session(data, device="cpu")


def test_a_graph_without_outputs_is_refused():
    """No run of it could give anything."""
    made = onnx.load_from_string(graph())
    del made.graph.output[:]

    with pytest.raises(ModelError, match="has no outputs"):
        Session(made.SerializeToString(), device="cpu")


@pytest.mark.parametrize(("field", "value"), [("ir_version", 99), ("opset", 99)])
def test_a_graph_from_later_is_refused_in_one_line(field, value):
    """What the runtime says is kept, but for where in its own code it says so."""
    made = onnx.load_from_string(graph())
    if field == "opset":
        made.opset_import[0].version = value
    else:
        made.ir_version = value

    with pytest.raises(ModelError, match="99") as caught:
        Session(made.SerializeToString(), device="cpu")

    assert len(str(caught.value).splitlines()) == 1
    assert "onnxruntime::" not in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "absolute"])
def test_weights_outside_the_graph_are_refused(tmp_path, monkeypatch, location, optimize):
    """A graph brings its weights: a file in the working directory was verified by nobody."""
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for folder in (tmp_path, tmp_path / "inside"):
        (folder / "weights.bin").write_bytes(WEIGHTS.tobytes())
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    where = str(tmp_path / "weights.bin") if location == "absolute" else location
    for key, value in {"location": where, "offset": "0", "length": str(WEIGHTS.nbytes)}.items():
        outside.external_data.add(key=key, value=value)

    with pytest.raises(ModelError, match="cannot load the graph"):
        Session(graph([outside]), device="cpu", optimize=optimize)


def test_threads_agree(session):
    """Concurrent runs give what runs in turn give."""
    batches = [np.random.default_rng(i).normal(size=(i % 7 + 1, 4)).astype(np.float32) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: session.run({"x": x})["logits"], batches))

    for x, got in zip(batches, together, strict=True):
        np.testing.assert_array_equal(got, session.run({"x": x})["logits"])


@pytest.mark.skipif(CUDA, reason="CUDA works here")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_gpu_is_not_replaced_by_the_cpu(device):
    """Who asks for a GPU gets it or an error that says how."""
    with pytest.raises(DeviceUnavailable, match="CUDA"):
        Session(graph(), device=device)


@pytest.mark.skipif(CUDA, reason="CUDA works here")
def test_auto_takes_the_cpu_where_there_is_no_cuda():
    """Left to choose, a session runs on what is there and says what that is."""
    assert Session(graph(), device="auto").device == "cpu"


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="no GPU, or an onnxruntime without CUDA")
def test_cuda_agrees_with_the_cpu(session):
    """The same graph gives the same answers on both devices, but for rounding."""
    x = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    cuda = Session(graph(), device="cuda")

    assert cuda.device == "cuda"
    np.testing.assert_allclose(cuda.run({"x": x})["logits"], session.run({"x": x})["logits"], atol=1e-2)


@pytest.mark.parametrize("value", ["", "0", "1", None], ids=str)
def test_telemetry_is_off_whatever_the_environment_says(value):
    """The runtime's telemetry is switched off before the runtime is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if value is not None:
        environment["ORT_DISABLE_TELEMETRY"] = value
    program = (
        "import os, sys, importlib.abc\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'onnxruntime': print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import bundle.session\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout == "1\n"


def test_missing_runtime_names_its_extras():
    """Without onnxruntime the error says what brings it."""
    program = "import sys; sys.modules['onnxruntime'] = None; import bundle.session"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert "MissingExtra: onnxruntime is not installed" in done.stderr
    assert "extras 'cpu' and 'cuda'" in done.stderr


def test_a_full_disk_is_no_fault_of_the_graph(monkeypatch):
    """Optimising it says so, instead of that it cannot be compiled, which an export would take for an answer."""
    assert optimized(graph())
    disk = list(os.statvfs("."))
    disk[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(disk))
    with pytest.raises(EdgewardError, match=r"has 0\.0 MB free.*TMPDIR") as caught:
        optimized(graph())
    assert not isinstance(caught.value, ModelError)
