"""What a GPU needs beside what the CPU does: options of its providers, runs with one copy each way, and CUDA graphs.

A captured graph is replayed with one call where a run launches each of its kernels. It is bound to the shapes, to the
addresses and, in onnxruntime, to the thread that it was captured with. While one is captured, no other thread of the
process may use the GPU: onnxruntime captures in CUDA's global mode, in which another's allocation would spoil it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, Lock

import numpy as np

from bundle.errors import ModelError
from bundle.pinned import Memory
from bundle.runtime import DATATYPES, onnxruntime
from bundle.tensor import NUMPY_TYPES, TensorSpec

PLACE = "cuda"  # where inputs and outputs lie, as onnxruntime names it

Run = Callable[[Sequence[str], Mapping[str, np.ndarray]], Sequence[np.ndarray]]
"""Names of outputs, inputs by name -> outputs."""

_GRAPH_ID = "gpu_graph_id"  # of a run: which graph it captures or replays
_NONE = "-1"  # neither
_TOLERANCE = 1e-2  # kernels and their order are the same; what goes wrong in a graph is wrong altogether


def providers(
    device: str, *, memory_bytes: int | None = None, capture: bool = False
) -> list[tuple[str, dict[str, str]]]:
    """What a session is started with: the providers of a device, in order of preference, and their options.

    Args:
        device: "cpu", "cuda" or "tensorrt".
        memory_bytes: most that the session may take on the GPU; without it, all that is free.
        capture: let runs become CUDA graphs.
    """
    if device == "cpu":
        return [("CPUExecutionProvider", {})]
    cuda = {
        "arena_extend_strategy": "kSameAsRequested",  # by default what is taken doubles each time
        "cudnn_conv_algo_search": "HEURISTIC",  # by default every new shape is timed, in the middle of a request
        "use_tf32": "0",  # what is called float32 has its 23 bits, as on the CPU; fp16 is the variant that has fewer
    }
    if memory_bytes is not None:
        cuda["gpu_mem_limit"] = str(memory_bytes)
    if capture:
        cuda["enable_cuda_graph"] = "1"
    if device == "cuda":
        return [("CUDAExecutionProvider", cuda)]
    tensorrt = {} if memory_bytes is None else {"trt_max_workspace_size": str(memory_bytes)}
    return [("TensorrtExecutionProvider", tensorrt), ("CUDAExecutionProvider", cuda)]  # CUDA runs what TensorRT cannot


class _SharedLock:
    """A lock that any number of threads hold together, or one alone; who wants it alone goes before later comers."""

    def __init__(self) -> None:
        self._door = Lock()
        self._left = Condition()
        self._inside = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._door, self._left:
            self._inside += 1
        try:
            yield
        finally:
            with self._left:
                self._inside -= 1
                self._left.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._door:
            with self._left:
                self._left.wait_for(lambda: not self._inside)
            yield


GPU = _SharedLock()
"""Held together by all that use the GPU, alone by who captures a graph. It may not be taken twice."""


def shared(run: Run) -> Run:
    """A run that waits while a graph is being captured."""

    def guarded(names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        with GPU.shared():
            return run(names, feeds)

    return guarded


def bound_run(session: onnxruntime.InferenceSession, memory: Memory) -> Run:
    """Runs with each input copied once to the GPU and each output once from it, into page-locked memory.

    The session is free for other threads meanwhile. Its own `run` would copy the outputs twice.

    Args:
        session: a graph without strings and without bfloat16.
        memory: for the outputs.
    """
    options = _options(_NONE)

    def run(names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        binding = session.io_binding()
        for name, array in feeds.items():  # copied as they are bound
            contiguous = np.asarray(array, order="C")
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(contiguous))
        for name in names:
            binding.bind_output(name, PLACE)
        session.run_with_iobinding(binding, options)
        return [_to_host(value, memory) for value in binding.get_outputs()]

    return run


class CapturedRuns:
    """Runs of a few fixed numbers of rows as CUDA graphs, in fixed buffers; other runs as they come.

    All of them take turns in one thread, which the graphs belong to.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        memory: Memory,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        sizes: Sequence[int],
    ) -> None:
        """Capture a graph for each number of rows, and see that it gives what a run gives.

        Args:
            session: started with `providers("cuda", capture=True)`.
            memory: for copies.
            inputs: of the graph, all that it takes.
            outputs: of the graph.
            sizes: numbers of rows.

        Raises:
            ModelError: an input has another open axis than the first, a run fails, or a graph gives something else.
        """
        _check_axes(inputs)
        self._inputs = inputs
        self._bound = bound_run(session, memory)
        self._thread = ThreadPoolExecutor(1, "cuda-graphs")
        self._graphs: dict[int, _Graph] = {}
        names = [spec.name for spec in outputs]
        with GPU.alone():
            for number, size in enumerate(sorted(set(sizes)), start=1):  # 0 is the runtime's own
                captured = self._thread.submit(self._capture, session, memory, names, size, number)
                try:
                    self._graphs[size] = captured.result()
                except Exception as error:  # onnxruntime's own classes derive from Exception
                    raise ModelError(f"no CUDA graph of {size} rows can be captured: {error}") from error

    def run(self, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        """Outputs; a graph's, where there is one for these rows."""
        graph = self._graphs.get(self._rows(feeds))
        if graph is None:
            return self._thread.submit(self._bound, names, feeds).result()
        return self._thread.submit(graph.run, feeds).result()

    def _rows(self, feeds: Mapping[str, np.ndarray]) -> int:
        """Of inputs that fit a graph's buffers; -1 of others, whose fault the runtime then tells."""
        rows = {len(array) if array.ndim else -1 for array in feeds.values()}
        if len(rows) != 1 or feeds.keys() != {spec.name for spec in self._inputs}:
            return -1
        (size,) = rows
        fit = all(
            feeds[spec.name].shape == (size, *spec.shape[1:]) and feeds[spec.name].dtype == NUMPY_TYPES[spec.datatype]
            for spec in self._inputs
        )
        return size if fit else -1

    def _capture(
        self, session: onnxruntime.InferenceSession, memory: Memory, names: Sequence[str], size: int, number: int
    ) -> "_Graph":
        zeros, others = ({spec.name: _example(spec, size, value) for spec in self._inputs} for value in (0.0, 0.5))
        outputs = dict(zip(names, self._bound(names, zeros), strict=True))
        graph = _Graph(session, memory, zeros, outputs, _options(str(number)))
        graph.run(zeros)  # the runtime runs it twice more before it captures
        for name, got, expected in zip(names, graph.run(others), self._bound(names, others), strict=True):
            if got.shape != expected.shape or not np.allclose(got, expected, _TOLERANCE, _TOLERANCE, equal_nan=True):
                raise ModelError(f"its {name!r} is not that of a run")
        return graph


class _Graph:
    """One captured graph and its buffers on the GPU."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        memory: Memory,
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        options: onnxruntime.RunOptions,
    ) -> None:
        self._session, self._memory, self._options = session, memory, options
        self._inputs = {name: _buffer(array) for name, array in inputs.items()}
        self._outputs = {name: _buffer(array) for name, array in outputs.items()}
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        for name, array in feeds.items():
            self._memory.to_device(self._inputs[name].data_ptr(), np.asarray(array, order="C"))
        self._session.run_with_iobinding(self._binding, self._options)
        return [_to_host(value, self._memory) for value in self._outputs.values()]


def _check_axes(inputs: Sequence[TensorSpec]) -> None:
    for spec in inputs:
        if not spec.shape or spec.shape[0] != -1 or -1 in spec.shape[1:]:
            raise ModelError(f"input {spec.name!r} is {list(spec.shape)}; only its first axis may, and must, be open.")


def _example(spec: TensorSpec, size: int, value: float) -> np.ndarray:
    """Numbers in floating point go to `value`; integers are zero, as they may be positions in a table."""
    shape, dtype = (size, *spec.shape[1:]), NUMPY_TYPES[spec.datatype]
    if dtype.kind != "f":
        return np.zeros(shape, dtype)
    return np.linspace(0.0, value, int(np.prod(shape))).astype(dtype).reshape(shape)


def _buffer(array: np.ndarray) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, PLACE)


def _to_host(value: onnxruntime.OrtValue, memory: Memory) -> np.ndarray:
    return memory.from_device(value.data_ptr(), value.shape(), NUMPY_TYPES[DATATYPES[value.data_type()]])


def _options(graph_id: str) -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    options.add_run_config_entry(_GRAPH_ID, graph_id)
    return options
