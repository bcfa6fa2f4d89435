"""A PyTorch network as an ONNX graph, and the proof that it computes the same."""

import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import torch

from bundle import preprocess
from bundle.errors import GateFailed, ModelError
from bundle.manifest import Input, Record
from bundle.session import Session
from export.quiet import silenced
from finetune.model import Network

OPSET = 20  # the first with Gelu
MAX_BYTES = (1 << 31) - 1  # of one protobuf message
PARITY_BATCHES = (1, 2, 3, 8)
PARITY = 1e-3  # largest difference of a logit, in standard deviations of the reference's logits


def to_onnx(network: Network, spec: Input, rows: Sequence[np.ndarray]) -> bytes:
    """Export by torch.onnx (dynamo), with a dynamic batch and, for text, a dynamic length.

    Args:
        network: in eval mode, float32, on the CPU.
        spec: of its input.
        rows: at least two preprocessed examples, which the exporter traces.

    Returns:
        The serialised model: inputs as bundle.preprocess.graph_inputs names them, one output `logits`.

    Raises:
        ModelError: the network cannot be exported, or not as asked.
    """
    inputs = preprocess.graph_inputs(spec)
    feeds = preprocess.collate(rows[:2], spec)  # a batch of one would be taken for a constant
    axes = ("batch", "length", "", "")
    shapes = tuple({i: axes[i] for i, size in enumerate(tensor.shape) if size == -1} for tensor in inputs)
    try:
        with warnings.catch_warnings(), silenced():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                tuple(torch.from_numpy(feeds[tensor.name]) for tensor in inputs),
                input_names=[tensor.name for tensor in inputs],
                output_names=["logits"],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch.export and onnxscript raise many classes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the network cannot be exported to ONNX: {reason[0]}") from error
    assert program is not None
    model = program.model_proto
    del model.graph.value_info[:]  # stale after the exporter's own optimisation; shape inference trips over it
    _check(model, spec)
    return bytes(model.SerializeToString())


def _check(model: onnx.ModelProto, spec: Input) -> None:
    if model.ByteSize() > MAX_BYTES:
        raise ModelError(f"the graph has {model.ByteSize()} bytes; the limit is {MAX_BYTES}.")
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset != OPSET:
        raise ModelError(f"the exporter wrote opset {opset} instead of {OPSET}.")
    expected = [(tensor.name, tensor.shape) for tensor in preprocess.graph_inputs(spec)]
    found = [(value.name, _shape(value)) for value in model.graph.input]
    if found != expected:
        raise ModelError(f"the exported graph takes {found} instead of {expected}: a dimension was fixed.")
    output = model.graph.output[0]
    if len(model.graph.output) != 1 or _shape(output)[0] != -1:
        raise ModelError(f"the exported graph gives {output.name} {_shape(output)}: its batch was fixed.")
    onnx.checker.check_model(model)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(-1 if axis.dim_param else axis.dim_value for axis in value.type.tensor_type.shape.dim)


class Parity(Record, frozen=True, kw_only=True):
    """Largest difference of a logit between the fp32 graph and PyTorch over all the batches tried."""

    exported: float  # with ONNX Runtime's optimisation off: the exporter's share
    served: float  # as it is served
    tolerance: float
    batches: tuple[int, ...]


def check_parity(graph: bytes, network: Network, spec: Input, rows: Sequence[np.ndarray]) -> Parity:
    """Hold the fp32 graph to PyTorch on real examples, alone and in batches of mixed length.

    Args:
        graph: from `to_onnx`.
        network: that it came from.
        spec: of its input.
        rows: preprocessed real examples.

    Raises:
        GateFailed: they differ by more than PARITY standard deviations, or a value is not finite.
    """
    feeds = [
        preprocess.collate([rows[(start + i) % len(rows)] for i in range(size)], spec)
        for size in PARITY_BATCHES
        for start in range(0, len(rows), max(size, len(rows) // 8))
    ]
    with torch.inference_mode():
        expected = [
            network(*(torch.from_numpy(f[t.name]) for t in preprocess.graph_inputs(spec))).numpy() for f in feeds
        ]
    tolerance = PARITY * float(np.std(np.concatenate(expected)))
    differences = []
    for optimize in (False, True):
        session = Session(graph, device="cpu", optimize=optimize)
        got = [session.run(f)["logits"] for f in feeds]
        differences.append(max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True)))
    parity = Parity(exported=differences[0], served=differences[1], tolerance=tolerance, batches=PARITY_BATCHES)
    if not parity.exported <= tolerance:  # NaN fails too
        raise GateFailed(_parity_message("the exporter", parity.exported, parity))
    if not parity.served <= tolerance:
        raise GateFailed(_parity_message("ONNX Runtime's optimisation", parity.served, parity))
    return parity


def _parity_message(culprit: str, difference: float, parity: Parity) -> str:
    return (
        f"the fp32 graph is not the PyTorch model: {culprit} changes a logit by {difference:.3g}, the tolerance is "
        f"{parity.tolerance:.3g} (batches of {parity.batches}). No bundle was written. "
        "Try other versions of torch, onnxscript or onnxruntime."
    )


def is_batch_invariant(session: Session, spec: Input, rows: Sequence[np.ndarray]) -> bool:
    """Whether every answer is bit-equal alone and unpadded, and in shuffled, padded batches of several sizes."""
    alone = [session.run(preprocess.collate([row], spec))["logits"][0] for row in rows]
    order = np.random.default_rng(0).permutation(len(rows))
    for size in PARITY_BATCHES[1:]:
        for start in range(0, len(rows) - size + 1, size):
            picked = order[start : start + size]
            together = session.run(preprocess.collate([rows[i] for i in picked], spec))["logits"]
            if not all(np.array_equal(together[k], alone[i]) for k, i in enumerate(picked)):
                return False
    return True
