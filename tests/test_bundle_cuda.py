"""What is CUDA's, on this machine's CPU: the same code, with host memory in the place of the GPU's."""

import ctypes
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import bundle.session
from bundle import cuda
from bundle.errors import DeviceUnavailable, ModelError
from bundle.log import captured
from bundle.pinned import Memory
from bundle.session import Session
from bundle.tensor import TensorSpec

CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/dev/nvidiactl").exists()
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
ROWS = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
on_a_gpu = pytest.mark.skipif(not CUDA, reason="no GPU, or an onnxruntime without CUDA")


class HostLibrary:
    """CUDA's runtime library with host memory in the place of the GPU's."""

    def __init__(self):
        self.blocks, self.copies, self.status = [], 0, 0

    def cudaHostAlloc(self, pointer, size, flags):
        self.blocks.append(ctypes.create_string_buffer(size.value))
        pointer._obj.value = ctypes.addressof(self.blocks[-1])
        return self.status

    def cudaMemcpy(self, target, source, size, kind):
        ctypes.memmove(target, source, size.value)
        self.copies += 1
        return self.status

    def cudaStreamSynchronize(self, stream):
        return 0


def model(nodes=None, inputs=(("x", TensorProto.FLOAT, ["N", 4]),), outputs=(("y", TensorProto.FLOAT, ["N", 3]),)):
    """By default y (N, 3) = x (N, 4) @ WEIGHTS."""
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "test",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return made.SerializeToString()


@pytest.fixture
def library(monkeypatch):
    """Buffers lie in the host's memory."""
    monkeypatch.setattr(cuda, "PLACE", "cpu")
    return HostLibrary()


@pytest.fixture
def host(monkeypatch, library):
    """Sessions for CUDA start on the CPU."""
    monkeypatch.setattr(cuda, "providers", lambda device, **_: [("CPUExecutionProvider", {})])
    monkeypatch.setattr(bundle.session, "Memory", partial(Memory, library))
    return library


def captured_runs(data, library, sizes):
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    inputs, _, outputs = bundle.session._signature(session)
    return cuda.CapturedRuns(session, Memory(library), inputs, outputs, sizes)


def test_the_cpu_has_no_options():
    """Limits of a GPU's memory say nothing about the CPU."""
    assert cuda.providers("cpu", memory_bytes=1) == [("CPUExecutionProvider", {})]


def test_options_of_cuda():
    """Memory grows by what is needed up to the limit, no shape is timed in a request, graphs are asked for."""
    ((name, options),) = cuda.providers("cuda", memory_bytes=1 << 30, capture=True)

    assert name == "CUDAExecutionProvider"
    assert options == {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "gpu_mem_limit": "1073741824",
        "enable_cuda_graph": "1",
    }
    assert not {"gpu_mem_limit", "enable_cuda_graph"} & cuda.providers("cuda")[0][1].keys()


def test_tensorrt_leaves_the_rest_to_cuda_within_the_same_limit():
    """What TensorRT cannot run, CUDA runs."""
    (first, workspace), (second, options) = cuda.providers("tensorrt", memory_bytes=1000)

    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert workspace == {"trt_max_workspace_size": "1000"}
    assert options["gpu_mem_limit"] == "1000"


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_bound_runs_give_what_runs_give(host, rows):
    """Bound inputs and outputs change no answer, whatever the rows and the strides."""
    x = ROWS[:rows, ::-1]
    session = Session(model(), device="cuda")

    assert session.device == "cuda"
    np.testing.assert_allclose(session.run({"x": x})["y"], x @ WEIGHTS, atol=1e-5)


def test_each_output_is_copied_once(host):
    """A run copies each output from the device once, into memory that the caller keeps."""
    session = Session(model(), device="cuda")
    first = session.run({"x": ROWS})["y"]
    session.run({"x": -ROWS})

    assert host.copies == 2
    np.testing.assert_allclose(first, ROWS @ WEIGHTS, atol=1e-5)


@pytest.mark.parametrize(
    "feeds",
    [{}, {"y": ROWS}, {"x": ROWS, "y": ROWS}, {"x": ROWS[:4, :3]}, {"x": ROWS[0]}, {"x": ROWS[:4].astype(np.float64)}],
    ids=["nothing", "other name", "one too many", "other width", "other rank", "other type"],
)
@pytest.mark.parametrize("sizes", [(), (4,)], ids=["bound", "captured"])
def test_wrong_feeds_are_refused(host, feeds, sizes):
    """What the graph does not take is a ModelError, and the session goes on."""
    session = Session(model(), device="cuda", batch_sizes=sizes)
    with pytest.raises(ModelError, match="ONNX Runtime failed"):
        session.run(feeds)

    assert session.run({"x": ROWS[:4]})["y"].shape == (4, 3)


def test_what_cannot_be_loaded_says_what_it_may_take(host):
    """A graph that is too large for its limit and one that is broken look alike to the runtime; the limit is told."""
    with pytest.raises(ModelError, match=r"cannot load the graph: .* It may take 1000 bytes of the GPU\."):
        Session(b"not a graph", device="cuda", gpu_memory_bytes=1000)


def test_strings_are_run_without_binding(host):
    """Strings lie on no GPU, and a graph that has them runs all the same."""
    strings = [("x", TensorProto.STRING, ["N"])], [("y", TensorProto.STRING, ["N"])]
    data = model([helper.make_node("Identity", ["x"], ["y"])], *strings)

    got = Session(data, device="cuda").run({"x": np.array(["a", "ü"], object)})
    assert got["y"].tolist() == ["a", "ü"]


def test_inputs_that_may_be_left_out_are_bound(host):
    """An initializer that is an input as well can be given or not."""
    both = [("x", TensorProto.FLOAT, ["N", 4]), ("w", TensorProto.FLOAT, [4, 3])]
    session = Session(model(inputs=both), device="cuda")

    np.testing.assert_allclose(session.run({"x": ROWS})["y"], ROWS @ WEIGHTS, atol=1e-5)
    np.testing.assert_allclose(session.run({"x": ROWS, "w": -WEIGHTS})["y"], ROWS @ -WEIGHTS, atol=1e-5)


def test_rows_of_a_batch_size_are_a_captured_graph(library, monkeypatch):
    """A run of an allowed number of rows replays the graph of these rows, any other number is run as it comes."""
    replayed = []
    run = cuda._Graph.run

    def watched(graph, feeds):
        replayed.append(len(next(iter(feeds.values()))))
        return run(graph, feeds)

    runs = captured_runs(model(), library, (4, 2))
    monkeypatch.setattr(cuda._Graph, "run", watched)
    for rows in (1, 2, 3, 4, 5):
        np.testing.assert_allclose(runs.run(["y"], {"x": ROWS[:rows]})[0], ROWS[:rows] @ WEIGHTS, atol=1e-5)

    assert replayed == [2, 4]


def test_each_graph_has_a_number_of_its_own(library, monkeypatch):
    """Runs of one size share a graph's number, other runs capture none, and 0 is left to the runtime."""
    numbers = []
    options = cuda._options
    monkeypatch.setattr(cuda, "_options", lambda number: numbers.append(number) or options(number))
    captured_runs(model(), library, (8, 2, 8))

    assert numbers == ["-1", "1", "2"]
    assert options("2").get_run_config_entry("gpu_graph_id") == "2"


def test_answers_of_a_graph_are_the_callers_own(library):
    """The buffers of a graph are used again; what it answered before is not touched."""
    runs = captured_runs(model(), library, (4,))
    first, second = (runs.run(["y"], {"x": ROWS[at : at + 4]})[0] for at in (0, 4))

    np.testing.assert_allclose(first, ROWS[:4] @ WEIGHTS, atol=1e-5)
    np.testing.assert_allclose(second, ROWS[4:8] @ WEIGHTS, atol=1e-5)


@pytest.mark.parametrize("sizes", [(), (1, 4)], ids=["bound", "captured"])
def test_threads_agree(host, sizes):
    """Threads that share a session get each the answer to its own question."""
    with captured() as logs:
        session = Session(model(), device="cuda", batch_sizes=sizes)
    assert logs == []
    batches = [np.full((i % 5 + 1, 4), i, np.float32) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: session.run({"x": x})["y"], batches))

    for x, got in zip(batches, together, strict=True):
        np.testing.assert_allclose(got, x @ WEIGHTS, rtol=1e-4)


@pytest.mark.parametrize("shape", [[4, 4], ["N", "L"], []], ids=["no open axis", "two open axes", "scalar"])
def test_other_shapes_are_not_captured(host, shape):
    """Where more than the first axis is open, or not even that, sessions run without graphs."""
    data = model([helper.make_node("Abs", ["x"], ["y"])], [("x", 1, shape)], [("y", 1, shape)])
    x = np.ones([4 if isinstance(size, str) else size for size in shape], np.float32)
    inputs = [TensorSpec("x", "FP32", tuple(-1 if isinstance(size, str) else size for size in shape))]

    with pytest.raises(ModelError, match="only its first axis may, and must, be open"):
        cuda._check_axes(inputs)
    np.testing.assert_array_equal(Session(data, device="cuda", batch_sizes=(4,)).run({"x": x})["y"], x)


def test_graph_that_answers_something_else_is_refused(library, monkeypatch):
    """What was frozen into a graph as it was captured is found by another input, and no such graph is replayed."""
    run = cuda._Graph.run
    monkeypatch.setattr(cuda._Graph, "run", lambda graph, feeds: [array + 1 for array in run(graph, feeds)])

    with pytest.raises(ModelError, match="no CUDA graph of 4 rows can be captured: its 'y' is not that of a run"):
        captured_runs(model(), library, (4,))


def test_output_whose_length_depends_on_the_input_is_refused(library):
    """A graph has fixed buffers, so an output that is longer for another input cannot be captured."""
    nodes = [helper.make_node("NonZero", ["x"], ["y"])]
    data = model(nodes, outputs=[("y", TensorProto.INT64, [2, "M"])])

    with pytest.raises(ModelError, match="no CUDA graph of 4 rows can be captured"):
        captured_runs(data, library, (4,))


def test_session_goes_on_without_graphs(host, monkeypatch):
    """Where nothing can be captured the same session runs as if no sizes were given, and the log says so."""
    monkeypatch.setattr(cuda, "_buffer", lambda array: 1 / 0)
    with captured() as logs:
        session = Session(model(), device="cuda", batch_sizes=(4,))

    (line,) = logs
    assert line["event"] == "no CUDA graphs"
    assert line["because"] == "no CUDA graph of 4 rows can be captured: division by zero"
    np.testing.assert_allclose(session.run({"x": ROWS[:4]})["y"], ROWS[:4] @ WEIGHTS, atol=1e-5)


def test_threads_of_graphs_end_with_their_session(library):
    """A model that was unloaded leaves no thread behind."""
    runs = captured_runs(model(), library, (2,))
    (thread,) = runs._thread._threads
    assert thread.is_alive()

    del runs
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_nothing_uses_the_gpu_while_a_graph_is_captured():
    """Who captures is alone: it waits for those inside, and others wait for it."""
    lock, entered, leave, order = cuda._SharedLock(), threading.Event(), threading.Event(), []

    def user():
        with lock.shared():
            entered.set()
            leave.wait(10)
            order.append("user")

    def capturer():
        with lock.alone():
            order.append("captured")

    threads = [threading.Thread(target=user), threading.Thread(target=capturer)]
    threads[0].start()
    entered.wait(10)
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["user", "captured"]
    with lock.shared(), lock.shared():
        pass


def test_memory_is_used_again_when_its_array_is_gone(library):
    """A block serves the next array of its size as soon as nobody holds the last one, not before."""
    memory = Memory(library)
    first = memory.empty((10, 3), np.dtype(np.float32))
    view = first[2:, 1]
    memory.empty((1,), np.dtype(np.int8))
    del first
    memory.empty((2,), np.dtype(np.int8))
    assert len(library.blocks) == 2

    del view
    kept = [memory.empty((1024,), np.dtype(np.float32)) for _ in range(2)]
    assert len(library.blocks) == 2
    assert memory.empty((1025,), np.dtype(np.float32)).nbytes == 4100
    assert len(library.blocks) == 3
    assert len(kept) == 2


def test_empty_arrays_and_scalars_are_copied(library):
    """No element is none, and one without an axis is one."""
    memory, source = Memory(library), np.array(7.0)

    assert memory.from_device(source.ctypes.data, (0, 3), np.dtype(np.int64)).shape == (0, 3)
    assert memory.from_device(source.ctypes.data, (), source.dtype) == 7.0


def test_cuda_that_fails_is_a_model_error(library):
    """A failed copy is an error that says what failed and CUDA's own number."""
    library.status = 700

    with pytest.raises(ModelError, match="CUDA failed copying 8 bytes: error 700"):
        Memory(library).to_device(np.zeros(1).ctypes.data, np.zeros(1))


@pytest.mark.skipif(CUDA, reason="CUDA works here")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_sizes_and_limits_do_not_hide_that_there_is_no_gpu(device):
    """Who asks for a GPU and its graphs on a machine without one is told so."""
    with pytest.raises(DeviceUnavailable, match="CUDA"):
        Session(model(), device=device, batch_sizes=(1, 4), gpu_memory_bytes=1 << 30)


@pytest.mark.cuda
@on_a_gpu
def test_graphs_are_captured_on_a_gpu():
    """On a real GPU every size gets its graph, and replays answer as the CPU does."""
    session = Session(model(), device="cuda", batch_sizes=(1, 4), gpu_memory_bytes=1 << 30)
    assert "CapturedRuns" in repr(session._run.__closure__[0].cell_contents)

    for rows in (1, 2, 4, 4, 1, 9):
        np.testing.assert_allclose(session.run({"x": ROWS[:rows]})["y"], ROWS[:rows] @ WEIGHTS, atol=1e-2)


@pytest.mark.cuda
@on_a_gpu
def test_graphs_of_two_sessions_do_not_disturb_each_other():
    """One model is loaded and captured while another answers."""
    busy, stop = Session(model(), device="cuda"), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: [busy.run({"x": ROWS}) for _ in iter(stop.is_set, True)])
        try:
            second = Session(model(), device="cuda", batch_sizes=(1, 2, 4, 8))
        finally:
            stop.set()
        assert all(np.allclose(each["y"], ROWS @ WEIGHTS, atol=1e-2) for each in answers.result(60))
    np.testing.assert_allclose(second.run({"x": ROWS[:8]})["y"], ROWS[:8] @ WEIGHTS, atol=1e-2)


@pytest.mark.cuda
@on_a_gpu
def test_memory_limit_holds_on_a_gpu():
    """What needs more than it may take is refused, and the GPU serves the next."""
    with pytest.raises((ModelError, DeviceUnavailable)):
        Session(model(), device="cuda", gpu_memory_bytes=1 << 20).run({"x": np.ones((1 << 20, 4), np.float32)})

    assert Session(model(), device="cuda").run({"x": ROWS})["y"].shape == (9, 3)
