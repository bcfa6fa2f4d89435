"""The only place where an ONNX Runtime session is made; the gate, the server, the scorer and the benchmarks run it."""

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from bundle import arena, bfloat16, cuda, weights
from bundle.errors import DeviceUnavailable, EdgewardError, ModelError
from bundle.host import cpu_count, products_saturate
from bundle.log import log
from bundle.pinned import Memory
from bundle.runtime import DATATYPES, onnxruntime
from bundle.tensor import TensorSpec

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

SPIN_US = 50
_SLOW = {"cpu": ["SkipLayerNormFusion"]}  # optimisations whose kernels are slower there than what they replace
_MAX_AXES = 64  # of numpy's arrays
_SOURCE = re.compile(r"/onnxruntime_src/\S+ [^()]*\([^()]*\) ")  # file, line and signature, in errors of the runtime
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
        self,
        graph: bytes,
        *,
        device: Device = "auto",
        threads: int | None = None,
        optimize: bool = True,
        gpu_memory_bytes: int | None = None,
        batch_sizes: Sequence[int] = (),
    ) -> None:
        """Load and optimise a graph.

        Args:
            graph: a serialised ONNX model.
            device: "auto" takes CUDA where it works, else the CPU, and logs which. "tensorrt" compiles its engines
                anew at every start, as files of them could not be verified.
            threads: of one run on the CPU; by default all the cores that this process may use.
            optimize: False leaves the graph as it was exported, to tell the exporter's faults from the runtime's.
            gpu_memory_bytes: most that this session may take on a GPU; by default all that is free.
            batch_sizes: numbers of rows that most runs have. On CUDA such a run is one CUDA graph, where the whole
                graph can be captured; where it cannot, the log says why.

        Raises:
            DeviceUnavailable: a GPU was asked for and cannot be used.
            ModelError: the runtime cannot load the graph, or could never be given what it takes or give what it makes.
        """
        self.threads = cpu_count() if threads is None else max(1, threads)
        load = partial(_load, graph, threads=self.threads, optimize=optimize, memory_bytes=gpu_memory_bytes)
        self.device, self._session, self._run = _start(load, device, batch_sizes)
        self.inputs, self.optional, self.outputs = _signature(self._session)
        self._output_names = [spec.name for spec in self.outputs]

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
        EdgewardError: there is no room for it among the temporary files.
    """
    from tempfile import TemporaryDirectory  # half a megabyte, of which a server has no need

    levels = onnxruntime.GraphOptimizationLevel
    options = _options(1, optimize=True)
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if level == "all" else levels.ORT_ENABLE_BASIC
    with TemporaryDirectory(prefix="edgeward-") as folder:
        _check_room(folder, len(graph))
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        try:
            _made(graph, options, "cpu", cuda.providers("cpu"))
        except Exception as error:  # onnxruntime's own classes derive from Exception
            raise ModelError(f"ONNX Runtime cannot load the graph: {error}") from error
        return path.read_bytes()


def _check_room(folder: str, size: int) -> None:
    """Tell a full disk from a graph at fault, for which the runtime has one and the same error."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < size:
        raise EdgewardError(
            f"{os.path.dirname(folder)} has {free / 1e6:.1f} MB free, and optimising a graph takes {size / 1e6:.1f}. "
            "Make room, or set TMPDIR to another folder."
        )


def node_times(graph: bytes, feeds: Sequence[Mapping[str, np.ndarray]], *, threads: int) -> dict[str, float]:
    """How long each node of a graph takes on the CPU, as the runtime names what it fused: ms, medians over the runs.

    Args:
        graph: a serialised ONNX model.
        feeds: inputs of the runs that count; before them the first is run twice.
        threads: of one run.

    Raises:
        ModelError: the runtime cannot load or run the graph.
    """
    from tempfile import TemporaryDirectory

    options = _options(threads, optimize=True)
    options.enable_profiling = True
    times: dict[str, list[float]] = {}
    with TemporaryDirectory(prefix="edgeward-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = _made(graph, options, "cpu", cuda.providers("cpu"))
            for feed in (*feeds[:1], *feeds[:1], *feeds):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_bytes())
        except Exception as error:  # onnxruntime's own classes derive from Exception
            raise ModelError(f"ONNX Runtime cannot profile the graph: {error}") from error
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            times.setdefault(event["name"].removesuffix(_KERNEL), []).append(event["dur"] / 1e3)
    return {name: float(np.median(each[-len(feeds) :])) for name, each in times.items()}


class _Signature(NamedTuple):
    inputs: tuple[TensorSpec, ...]
    optional: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class _Load(Protocol):
    def __call__(self, *, device: str, capture: bool = False) -> onnxruntime.InferenceSession: ...


def _start(
    load: _Load, device: Device, sizes: Sequence[int]
) -> tuple[Literal["cpu", "cuda", "tensorrt"], onnxruntime.InferenceSession, cuda.Run]:
    if device != "auto":
        return device, *_open(load, device, sizes)
    try:
        return "cuda", *_open(load, "cuda", sizes)
    except DeviceUnavailable as error:
        log.info("device chosen", device="cpu", because=str(error))
        return "cpu", *_open(load, "cpu", sizes)


def _open(load: _Load, device: str, sizes: Sequence[int]) -> tuple[onnxruntime.InferenceSession, cuda.Run]:
    """A session, and how it is run."""
    if device == "cuda" and sizes:
        try:
            return _captured(load, sizes)
        except ModelError as error:
            log.info("no CUDA graphs", because=str(error))
    session = load(device=device)
    run = _run(session, device)
    return session, run if device == "cpu" else cuda.shared(run)


def _captured(load: _Load, sizes: Sequence[int]) -> tuple[onnxruntime.InferenceSession, cuda.Run]:
    session = load(device="cuda", capture=True)
    inputs, _, outputs = _signature(session)
    return session, cuda.shared(cuda.CapturedRuns(session, Memory(), inputs, outputs, sizes).run)


def _run(session: onnxruntime.InferenceSession, device: str) -> cuda.Run:
    signature = _signature(session)
    datatypes = {spec.datatype for specs in signature for spec in specs}
    if "BF16" in datatypes:
        bfloat16.check_no_strings((*signature.inputs, *signature.optional))
        return partial(bfloat16.run, session)
    if device == "cpu" or "BYTES" in datatypes:  # strings never lie on a GPU
        return arena.run_of(session)
    return cuda.bound_run(session, Memory())


def _signature(session: onnxruntime.InferenceSession) -> _Signature:
    try:
        signature = _read_signature(session)
    except UnicodeDecodeError as error:
        raise ModelError("an input or output, or one of its axes, has a name that is not UTF-8.") from error
    if not signature.outputs:
        raise ModelError("the graph has no outputs, so that no run of it gives anything.")
    return signature


def _read_signature(session: onnxruntime.InferenceSession) -> _Signature:
    taken, replaceable = session.get_inputs(), session.get_overridable_initializers()
    optional = (
        *(_spec(node, "input") for node in taken if _is_optional(node)),
        *(_spec(node, "input") for node in replaceable if node.type in DATATYPES),
    )
    return _Signature(
        tuple(_spec(node, "input") for node in taken if not _is_optional(node)),
        optional,
        tuple(_spec(node, "output") for node in session.get_outputs()),
    )


def _load(
    graph: bytes, *, device: str, threads: int, optimize: bool, memory_bytes: int | None, capture: bool = False
) -> onnxruntime.InferenceSession:
    providers = cuda.providers(device, memory_bytes=memory_bytes, capture=capture)
    wanted, available = providers[0][0], onnxruntime.get_available_providers()
    if wanted not in available:
        raise DeviceUnavailable(
            f"this onnxruntime has no {wanted}, only {', '.join(available)}. "
            "For CUDA: pip uninstall onnxruntime, then install edgeward with its extra 'cuda'."
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
        with nullcontext() if device == "cpu" else cuda.GPU.shared():
            session = _made(read, options, device, providers)
    except Exception as error:
        # The provider's own errors are RuntimeErrors; those of a bad graph derive from Exception.
        if device != "cpu" and isinstance(error, RuntimeError):
            raise DeviceUnavailable(f"{name} cannot be used here: {error}") from error
        limit = "" if device == "cpu" or memory_bytes is None else f" It may take {memory_bytes} bytes of the GPU."
        why = " ".join(_SOURCE.sub("", str(error)).split())  # one line
        raise ModelError(f"ONNX Runtime cannot load the graph: {why}{limit}") from error
    if session.get_providers()[0] != wanted:  # the runtime falls back to the next without an error
        raise DeviceUnavailable(f"{name} cannot be used here: no GPU, no driver, or no {name} libraries.")
    return session


def _made(
    graph: bytes, options: onnxruntime.SessionOptions, device: str, providers: Any
) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        graph, sess_options=options, providers=providers, enable_fallback=0, disabled_optimizers=_SLOW.get(device)
    )


def _options(threads: int, optimize: bool) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors arrive as exceptions; one bad request must not write to the log as well
    # Weights outside the graph are refused: they would be read from the working directory, and nobody verified them.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    # Between two layers a thread that waits spins for a moment, as to wake it takes longer; between two runs it sleeps.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Exact products for int8, which would saturate. Elsewhere they are exact anyway, and this would double their time.
    options.add_session_config_entry("session.x64quantprecision", str(int(products_saturate())))
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _is_optional(node: onnxruntime.NodeArg) -> bool:
    return node.type.startswith("optional(") and node.type[9:-1] in DATATYPES


def _spec(node: onnxruntime.NodeArg, place: str) -> TensorSpec:
    kind = node.type[9:-1] if place == "input" and _is_optional(node) else node.type
    if kind not in DATATYPES:
        raise ModelError(
            f"{place} {node.name!r} is of type {node.type}, which is not supported; what can be taken and given are "
            f"tensors of {', '.join(DATATYPES.values())}. Sequences, maps, sparse tensors, float8 and what is smaller "
            "than a byte must stay inside the graph."
        )
    if len(node.shape) > _MAX_AXES:
        raise ModelError(f"{place} {node.name!r} has {len(node.shape)} axes; tensors have at most {_MAX_AXES}.")
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(node.name, DATATYPES[kind], shape)
