"""The only place where an ONNX Runtime session is made; the gate, the server, the scorer and the benchmarks run it."""

import ctypes
import json
import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import structlog

from bundle import weights
from bundle.errors import DeviceUnavailable, MissingExtra, ModelError
from bundle.host import cpu_count, products_saturate
from bundle.tensor import NUMPY_TYPES, TensorSpec

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import, which already writes below HOME; "" and "0" leave it on
try:
    import onnxruntime
except ImportError as error:
    raise MissingExtra(
        "onnxruntime is not installed. Install one of: pip install 'edgeward[cpu]', pip install 'edgeward[cuda]'."
    ) from error

log = structlog.get_logger()

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],  # CUDA runs what TensorRT cannot
}
_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

_BFLOAT16 = 16  # in ONNX's TensorProto.DataType
_SLOW = {"cpu": ["SkipLayerNormFusion"]}  # optimisations whose kernels are slower there than what they replace
_KERNEL = "_kernel_time"  # ends the name of a profile's event that is a node's


class Session:
    """One ONNX graph on one device. `run` may be called from several threads at once.

    Attributes:
        device: "cpu", "cuda" or "tensorrt", the one it really runs on.
        inputs: what the graph must be given, in its order.
        optional: what it may be given: inputs of an ONNX optional type, and initializers that are inputs as well.
        outputs: what the graph gives, in its order.
    """

    def __init__(
        self, graph: bytes, *, device: Device = "auto", threads: int | None = None, optimize: bool = True
    ) -> None:
        """Load and optimise a graph.

        Args:
            graph: a serialised ONNX model.
            device: "auto" takes CUDA where it works, else the CPU, and logs which. "tensorrt" compiles its engines
                anew at every start, as files of them could not be verified.
            threads: of one run on the CPU; by default all the cores that this process may use.
            optimize: False leaves the graph as it was exported, to tell the exporter's faults from the runtime's.

        Raises:
            DeviceUnavailable: a GPU was asked for and cannot be used.
            ModelError: the runtime cannot load the graph.
        """
        self.threads = cpu_count() if threads is None else max(1, threads)
        self.device, self._session = _start(graph, device, self.threads, optimize)
        taken, replaceable = self._session.get_inputs(), self._session.get_overridable_initializers()
        self.inputs = tuple(_spec(node, "input") for node in taken if not _is_optional(node))
        self.optional = (
            *(_spec(node, "input") for node in taken if _is_optional(node)),
            *(_spec(node, "input") for node in replaceable if node.type in _DATATYPES),
        )
        self.outputs = tuple(_spec(node, "output") for node in self._session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]
        self._run = self._session.run
        if "BF16" in {spec.datatype for spec in (*self.inputs, *self.optional, *self.outputs)}:
            _check_no_strings((*self.inputs, *self.optional))
            self._run = partial(_run_bfloat16, self._session)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            ModelError: the runtime refuses the inputs, or fails.
        """
        try:
            values = self._run(self._output_names, feeds)
        except Exception as error:  # onnxruntime's own classes derive from Exception, RuntimeError or ValueError
            raise ModelError(f"ONNX Runtime failed: {error}") from error
        return dict(zip(self._output_names, values, strict=True))


def optimized(graph: bytes, *, level: Literal["basic", "all"] = "all") -> bytes:
    """The graph as the runtime would run it on the CPU of this machine, a serialised ONNX model.

    Args:
        graph: a serialised ONNX model.
        level: "basic" folds constants and joins what is redundant, and any ONNX runtime can load the result; "all" has
            kernels of this runtime and of this machine.

    Raises:
        ModelError: the runtime cannot load the graph.
    """
    levels = onnxruntime.GraphOptimizationLevel
    options = _options(1, optimize=True)
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if level == "all" else levels.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory(prefix="edgeward-") as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(
                graph,
                sess_options=options,
                providers=_PROVIDERS["cpu"],
                enable_fallback=0,
                disabled_optimizers=_SLOW["cpu"],
            )
        except Exception as error:  # onnxruntime's own classes derive from Exception
            raise ModelError(f"ONNX Runtime cannot load the graph: {error}") from error
        return path.read_bytes()


def node_times(graph: bytes, feeds: Sequence[Mapping[str, np.ndarray]], *, threads: int) -> dict[str, float]:
    """How long each node of a graph takes on the CPU, as the runtime names what it fused: ms, medians over the runs.

    Args:
        graph: a serialised ONNX model.
        feeds: inputs of the runs that count; before them the first is run twice.
        threads: of one run.

    Raises:
        ModelError: the runtime cannot load or run the graph.
    """
    options = _options(threads, optimize=True)
    options.enable_profiling = True
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="edgeward-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = onnxruntime.InferenceSession(
                graph,
                sess_options=options,
                providers=_PROVIDERS["cpu"],
                enable_fallback=0,
                disabled_optimizers=_SLOW["cpu"],
            )
            for feed in (*feeds[:1], *feeds[:1], *feeds):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_bytes())
        except Exception as error:  # onnxruntime's own classes derive from Exception
            raise ModelError(f"ONNX Runtime cannot profile the graph: {error}") from error
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            times.setdefault(event["name"].removesuffix(_KERNEL), []).append(event["dur"] / 1e3)
    return {name: float(np.median(each[-len(feeds) :])) for name, each in times.items()}


def _start(
    graph: bytes, device: Device, threads: int, optimize: bool
) -> tuple[Literal["cpu", "cuda", "tensorrt"], onnxruntime.InferenceSession]:
    if device != "auto":
        return device, _load(graph, device, threads, optimize)
    try:
        return "cuda", _load(graph, "cuda", threads, optimize)
    except DeviceUnavailable as error:
        log.info("device chosen", device="cpu", because=str(error))
        return "cpu", _load(graph, "cpu", threads, optimize)


def _load(graph: bytes, device: str, threads: int, optimize: bool) -> onnxruntime.InferenceSession:
    providers = _PROVIDERS[device]
    available = onnxruntime.get_available_providers()
    if providers[0] not in available:
        raise DeviceUnavailable(
            f"this onnxruntime has no {providers[0]}, only {', '.join(available)}. "
            "For CUDA: pip uninstall onnxruntime; pip install 'edgeward[cuda]'."
        )
    if device != "cpu" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # the CUDA libraries of pip's nvidia packages
    name = {"cuda": "CUDA", "tensorrt": "TensorRT"}.get(device, device)
    options, read = _options(threads, optimize), graph
    if device == "cpu":  # where it was measured
        file = secrets.token_hex(16)
        read = weights.without_weights(graph, file)
        options.add_external_initializers_from_files_in_memory([file], [graph], [len(graph)])
    try:
        session = onnxruntime.InferenceSession(
            read,
            sess_options=options,
            providers=providers,
            enable_fallback=0,
            disabled_optimizers=_SLOW.get(device),
        )
    except Exception as error:
        # The provider's own errors are RuntimeErrors; those of a bad graph derive from Exception.
        if device != "cpu" and isinstance(error, RuntimeError):
            raise DeviceUnavailable(f"{name} cannot be used here: {error}") from error
        raise ModelError(f"ONNX Runtime cannot load the graph: {error}") from error
    if session.get_providers()[0] != providers[0]:  # the runtime falls back to the next without an error
        raise DeviceUnavailable(f"{name} cannot be used here: no GPU, no driver, or no {name} libraries.")
    return session


def _options(threads: int, optimize: bool) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors arrive as exceptions; one bad request must not write to the log as well
    # Weights outside the graph are refused: they would be read from the working directory, and nobody verified them.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle session costs no core
    # Exact products for int8, which would saturate. Elsewhere they are exact anyway, and this would double their time.
    options.add_session_config_entry("session.x64quantprecision", str(int(products_saturate())))
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _is_optional(node: onnxruntime.NodeArg) -> bool:
    return node.type.startswith("optional(") and node.type[9:-1] in _DATATYPES


def _check_no_strings(inputs: Sequence[TensorSpec]) -> None:
    strings = [spec.name for spec in inputs if spec.datatype == "BYTES"]
    if strings:
        raise ModelError(
            f"the graph has tensors of BF16 and takes {strings[0]!r}, of BYTES: ONNX Runtime cannot be given both from "
            "Python. Cast one of them in the graph."
        )


def _run_bfloat16(
    session: onnxruntime.InferenceSession, names: Sequence[str], feeds: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """As session.run, which knows no bfloat16 because numpy has none: here it is two raw bytes."""
    values = {name: _ort_value(array) for name, array in feeds.items()}
    return [_array(value) for value in session.run_with_ort_values(names, values)]


def _ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    array = np.asarray(array, order="C")
    if array.dtype != NUMPY_TYPES["BF16"]:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)


def _array(value: onnxruntime.OrtValue) -> np.ndarray:
    if value.data_type() != "tensor(bfloat16)":
        array: np.ndarray = value.numpy()
        return array
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())  # copied: the memory is the value's
    return np.frombuffer(data, NUMPY_TYPES["BF16"]).reshape(value.shape())


def _spec(node: onnxruntime.NodeArg, place: str) -> TensorSpec:
    kind = node.type[9:-1] if place == "input" and _is_optional(node) else node.type
    if kind not in _DATATYPES:
        raise ModelError(
            f"{place} {node.name!r} is of type {node.type}, which is not supported; what can be taken and given are "
            f"tensors of {', '.join(_DATATYPES.values())}. Sequences, maps, sparse tensors, float8 and what is smaller "
            "than a byte must stay inside the graph."
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(node.name, _DATATYPES[kind], shape)
