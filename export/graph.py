"""A PyTorch network as an ONNX graph, and the proof that it computes the same."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from bundle import preprocess
from bundle.errors import GateFailed, ModelError
from bundle.manifest import ImageInput, Input, Record, Task
from bundle.outputs import logits_widths
from bundle.session import Session
from export import refusal
from export.batches import SIZES, parity_batches, parity_sizes
from export.fold import folded
from export.fusion import forget_shapes, fused
from export.quiet import silenced
from export.scaling import scale_rows
from finetune.model import Network
from finetune.target import columns

OPSET = 20  # the first with Gelu
MAX_BYTES = (1 << 31) - 1  # of one protobuf message
PARITY = 1e-3  # largest difference of a logit, in standard deviations of the reference's logits
ROUNDING = 1e-6  # of the largest logit: what float32 cannot hold is no difference, however small the deviation
FEATURES = "backbone_features"  # an output; a vector's input is called `features`
TRACED_LENGTH = 3  # at least: a length of one, or that of the batch, would be taken for a constant


class _Outputs(nn.Module):
    """A network that gives what the graph gives: logits task by task, by one layer each, and its features if wanted.

    int8 then has a range for each task's logits instead of one for all.
    """

    def __init__(self, network: Network, tasks: Sequence[Task], features: bool) -> None:
        super().__init__()
        self.network = network
        self.with_features = features
        self.heads = nn.ModuleList()
        for part in columns(tasks):
            weight, bias = network.head.weight.detach()[part], network.head.bias.detach()[part]
            head = nn.Linear(weight.shape[1], weight.shape[0])
            head.load_state_dict({"weight": weight.clone(), "bias": bias.clone()})
            self.heads.append(head)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        features = self.network.features(*inputs)
        logits = tuple(head(features) for head in self.heads)
        return (*logits, features) if self.with_features else logits


def to_onnx(
    network: Network, spec: Input, tasks: Sequence[Task], rows: Sequence[np.ndarray], *, features: bool = False
) -> bytes:
    """Export by torch.onnx (dynamo), with a dynamic batch and, for text and words, a dynamic length.

    BatchNorm is folded before (export.fold), attention and global pooling are fused after it (export.fusion).

    Args:
        network: in eval mode, float32, on the CPU.
        spec: of its input.
        tasks: of its head; none leaves the head away.
        rows: at least two preprocessed examples, which the exporter traces.
        features: give what the head sees, too, as the last output FEATURES, float32 (N, D).

    Returns:
        The serialised model: inputs as bundle.preprocess.graph_inputs names them, outputs as
        bundle.outputs.logits_widths does.

    Raises:
        ModelError: the network cannot be exported, or not as asked.
    """
    inputs = preprocess.graph_inputs(spec)
    names = _output_names(tasks, features)
    length = max(TRACED_LENGTH, *(row.shape[-1] for row in rows[:2])) if preprocess.is_sequence(spec) else None
    feeds = preprocess.collate(list(rows[:2]), spec, length)  # a batch of one would be taken for a constant
    axes = ("batch", "length", "", "")
    shapes = tuple({i: axes[i] for i, size in enumerate(tensor.shape) if size == -1} for tensor in inputs)
    module = _Outputs(folded(network), tasks, features).eval()
    tensors = tuple(_traced(feeds[tensor.name]) for tensor in inputs)
    try:
        with warnings.catch_warnings(), silenced():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                tensors,
                input_names=[tensor.name for tensor in inputs],
                output_names=names,
                dynamic_shapes=(shapes,),  # one tuple for *inputs
                opset_version=OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch.export and onnxscript raise many classes
        why = refusal.reason(error, lambda: torch.export.export(module, tensors, strict=False))
        raise ModelError(f"the network cannot be exported to ONNX: {why}") from error
    assert program is not None
    graph, _ = fused(program.model_proto.SerializeToString())
    model = _bare(onnx.load_from_string(graph))
    if isinstance(spec, ImageInput):
        scale_rows(model)
    _check(model, spec, names)
    return bytes(model.SerializeToString())


def _traced(values: np.ndarray) -> Tensor:
    """An example of an input; pixels lie in memory channels first.

    Channels last, PyTorch's global pooling would be traced with the strides that it writes, by eight nodes each.
    """
    tensor = torch.from_numpy(values)
    return tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model without what the exporter notes beside it: where on its disk each node came from, and stale shapes."""
    forget_shapes(model)
    del model.metadata_props[:], model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
    return model


def _output_names(tasks: Sequence[Task], features: bool) -> list[str]:
    return [*logits_widths(tuple(tasks)), *([FEATURES] if features else [])]


def _check(model: onnx.ModelProto, spec: Input, names: Sequence[str]) -> None:
    if model.ByteSize() > MAX_BYTES:
        raise ModelError(f"the graph has {model.ByteSize()} bytes; the limit is {MAX_BYTES}.")
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset != OPSET:
        raise ModelError(f"the exporter wrote opset {opset} instead of {OPSET}.")
    expected = [(tensor.name, tensor.shape) for tensor in preprocess.graph_inputs(spec)]
    found = [(value.name, _shape(value)) for value in model.graph.input]
    if found != expected:
        raise ModelError(f"the exported graph takes {found} instead of {expected}: a dimension was fixed.")
    outputs = {value.name: _shape(value) for value in model.graph.output}
    if list(outputs) != list(names) or any(shape[0] != -1 for shape in outputs.values()):
        raise ModelError(f"the exported graph gives {outputs} instead of {list(names)} with a free batch.")
    onnx.checker.check_model(model)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(-1 if axis.dim_param else axis.dim_value for axis in value.type.tensor_type.shape.dim)


def with_head(graph: bytes, weight: np.ndarray, bias: np.ndarray, tasks: Sequence[Task]) -> bytes:
    """Append a linear head in float32 to a graph that gives FEATURES.

    Args:
        graph: its only output is FEATURES, float32 (N, D).
        weight: float32 (columns of all tasks, D).
        bias: float32 (columns of all tasks,).
        tasks: of the head; each becomes an output of the result.
    """
    model = onnx.load_from_string(graph)
    del model.graph.output[:]
    for (name, width), part in zip(logits_widths(tuple(tasks)).items(), columns(tasks), strict=True):
        parameters = [f"{name}.weight", f"{name}.bias"]
        for parameter, values in zip(parameters, (weight[part], bias[part]), strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), parameter))
        model.graph.node.append(
            helper.make_node("Gemm", [FEATURES, *parameters], [name], name=f"{name}.head", transB=1)
        )
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def joined(outputs: Mapping[str, np.ndarray], tasks: Sequence[Task]) -> np.ndarray:
    """The graph's outputs as one matrix, float32 (N, columns of all tasks), in the tasks' order."""
    return np.concatenate([outputs[name] for name in logits_widths(tuple(tasks))], axis=1)


class Parity(Record, frozen=True, kw_only=True):
    """Largest difference of a logit between the fp32 graph and the reference over all the batches tried.

    Of several outputs, that of the one which came closest to its tolerance.
    """

    exported: float  # with ONNX Runtime's optimisation off: the exporter's share
    served: float  # as it is served
    tolerance: float
    batches: tuple[int, ...]


def check_parity(
    graph: bytes, network: Network, spec: Input, tasks: Sequence[Task], rows: Sequence[np.ndarray]
) -> Parity:
    """Hold every output of the fp32 graph to PyTorch, on real examples: see export.batches.

    Args:
        graph: from `to_onnx`.
        network: that it came from.
        spec: of its input.
        tasks: of its head.
        rows: preprocessed real examples.

    Raises:
        GateFailed: they differ by more than PARITY standard deviations, or a value is not finite.
    """
    names = [tensor.name for tensor in preprocess.graph_inputs(spec)]

    def reference(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = network(*(torch.from_numpy(feeds[name]) for name in names)).numpy()
        return logits

    try:
        return hold(graph, reference, spec, tasks, rows)
    except GateFailed as error:
        raise GateFailed(
            f"the fp32 graph is not the PyTorch model: {error} Nothing was written. "
            "Try other versions of torch, onnxscript or onnxruntime."
        ) from error


def hold(
    graph: bytes,
    reference: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    spec: Input,
    tasks: Sequence[Task],
    rows: Sequence[np.ndarray],
) -> Parity:
    """Hold every output of a graph to what a reference gives for the same batches.

    Args:
        graph: takes bundle.preprocess.graph_inputs.
        reference: the graph's inputs by name -> logits float32 (N, columns of all tasks).
        spec: of the input.
        tasks: of the logits.
        rows: preprocessed real examples.

    Raises:
        GateFailed: they differ by more than PARITY standard deviations, or a value is not finite.
    """
    sizes, feeds = parity_sizes(spec, rows), parity_batches(spec, rows)
    expected = np.concatenate([reference(f) for f in feeds])
    optimized = []
    for optimize in (False, True):
        session = Session(graph, device="cpu", optimize=optimize)
        optimized.append(np.abs(np.concatenate([joined(session.run(f), tasks) for f in feeds]) - expected))
    results = [_parity(sizes, expected[:, part], *(each[:, part] for each in optimized)) for part in columns(tasks)]
    for parity in results:
        if not parity.exported <= parity.tolerance:  # NaN fails too
            raise GateFailed(_parity_message("the exporter", parity.exported, parity))
        if not parity.served <= parity.tolerance:
            raise GateFailed(_parity_message("ONNX Runtime's optimisation", parity.served, parity))
    return max(results, key=lambda parity: parity.served / parity.tolerance)


def _parity(batches: tuple[int, ...], reference: np.ndarray, exported: np.ndarray, served: np.ndarray) -> Parity:
    """Of one output: the reference's logits, and how far they are from the graph's, all float32 (N, columns)."""
    tolerance = max(PARITY * float(reference.std()), ROUNDING * float(np.abs(reference).max()), 1e-12)
    return Parity(exported=float(exported.max()), served=float(served.max()), tolerance=tolerance, batches=batches)


def _parity_message(culprit: str, difference: float, parity: Parity) -> str:
    return (
        f"{culprit} changes a logit by {difference:.3g}, the tolerance is {parity.tolerance:.3g} (batches of "
        f"{parity.batches})."
    )


def is_batch_invariant(session: Session, spec: Input, rows: Sequence[np.ndarray]) -> bool:
    """Whether every answer is bit-equal alone and unpadded, and in shuffled, padded batches of several sizes."""
    alone = [session.run(preprocess.collate([row], spec)) for row in rows]
    order = np.random.default_rng(0).permutation(len(rows))
    for size in SIZES[1:]:
        for start in range(0, len(rows) - size + 1, size):
            picked = order[start : start + size]
            together = session.run(preprocess.collate([rows[i] for i in picked], spec))
            for k, i in enumerate(picked):
                if not all(np.array_equal(values[k], alone[i][name][0]) for name, values in together.items()):
                    return False
    return True
