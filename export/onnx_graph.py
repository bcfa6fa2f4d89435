"""Any user's ONNX model: read, checked, and edited into the graph that a bundle holds."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from bundle.errors import ModelError
from bundle.manifest import ImageInput, Input, TextInput
from bundle.session import Session
from bundle.tensor import NUMPY_TYPES, TensorSpec
from export.graph import MAX_BYTES
from export.nodes import prune, subgraphs

FLOOR = 1e-30  # least probability of which a logarithm is taken
_STANDARD = ("", "ai.onnx.ml")
_PLAIN = ("Identity", "Cast")
_Step = tuple[str, dict[str, int], np.ndarray | None]


@dataclass(frozen=True)
class Head:
    """Where a task's logits are in a model as it came.

    Attributes:
        output: of the model.
        activation: the softmax or sigmoid that the output comes from, which the bundle leaves away.
        value: what that takes; without one the output.
        columns: of the logits.
        axes: of the value, 1 or 2.
        dtype: of the value.
        probabilities: the value is probabilities; their logarithms are the logits.
    """

    output: str
    activation: str | None
    value: str
    columns: int
    axes: int
    dtype: np.dtype
    probabilities: bool = False

    @property
    def steps(self) -> list[_Step]:
        """Operators that make the logits of the value, with their attributes and their second input."""
        steps: list[_Step] = []
        if self.dtype != np.float32:
            steps.append(("Cast", {"to": TensorProto.FLOAT}, None))
        if self.axes == 1:
            steps.append(("Reshape", {}, np.array([-1, 1])))
        if self.probabilities:
            steps += [("Max", {}, np.array(FLOOR, np.float32)), ("Log", {}, None)]
        return steps

    def logits(self, values: np.ndarray) -> np.ndarray:
        """Logits float32 (N, columns) from the value."""
        logits = values.astype(np.float32).reshape(len(values), self.columns)
        return np.log(np.maximum(logits, np.float32(FLOOR))) if self.probabilities else logits


def read_model(path: Path) -> tuple[onnx.ModelProto, str]:
    """A model with all its weights, and the hex sha256 of its file and of those that its weights are in.

    Dictionaries of probabilities (ZipMap of skl2onnx) are taken off: the tensors that they are made of are the outputs.

    Raises:
        ModelError: it cannot be read, is larger than 2 GiB, or has an operator that there is not.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        files = [path, *(path.parent / name for name in _external(model.graph))]
        size = sum(file.stat().st_size for file in files)
        if size > MAX_BYTES:
            raise ModelError(f"{path} and its weights have {size} bytes; the limit is {MAX_BYTES}.")
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, DecodeError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path} cannot be read as an ONNX model: {error}") from error
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    _check_operators(path, model)
    _drop_dictionaries(model.graph)
    return model, digest.hexdigest()


def _external(graph: onnx.GraphProto) -> list[str]:
    """The files beside the model that hold its weights."""
    tensors = [*graph.initializer, *(attribute.t for node in _nodes(graph) for attribute in node.attribute)]
    entries = [entry for tensor in tensors for entry in tensor.external_data if entry.key == "location"]
    return sorted({entry.value for entry in entries})


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of subgraphs included."""
    for node in graph.node:
        yield node
        for subgraph in subgraphs(node):
            yield from _nodes(subgraph)


def _check_operators(path: Path, model: onnx.ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset, newest = versions.get("", versions.get("ai.onnx", 0)), onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ModelError(
            f"{path} is of opset {opset}, and {newest} is the newest known. Export it with an older, as 17."
        )
    for node in _nodes(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in _STANDARD:
            continue  # ONNX Runtime may have it
        version = versions.get(domain, versions.get("ai.onnx", 0))
        try:
            onnx.defs.get_schema(node.op_type, max_inclusive_version=version, domain=domain)
        except onnx.defs.SchemaError as error:
            raise ModelError(
                f"{path} has the operator {node.op_type} in {_called(node)}, which {domain or 'ai.onnx'} {version} "
                "does not have. Export the model with standard operators."
            ) from error


def _called(node: onnx.NodeProto) -> str:
    return f"node {node.name!r}" if node.name else f"the node that gives {', '.join(map(repr, node.output))}"


def _drop_dictionaries(graph: onnx.GraphProto) -> None:
    for node in [node for node in graph.node if node.op_type == "ZipMap"]:
        outputs = [value for value in graph.output if value.name == node.output[0]]
        graph.node.remove(node)
        for value in outputs:
            graph.output.remove(value)
            graph.output.append(helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, None))


def adapted(model: onnx.ModelProto, spec: Input) -> onnx.ModelProto:
    """The model, where preprocessing lacks a step to it: scaled images, and the token types of single texts.

    A model of images that takes floats (N, 3, height, width) is given them scaled by the mean and std of its input, and
    one of texts that takes `token_type_ids`, too, has zeros for them. Anything else is left as it is.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    inputs = {value.name: value for value in graph.input}
    match spec:
        case ImageInput() if len(inputs) == 1 and _takes_channels(graph.input[0], spec):
            pixels = f"{graph.input[0].name}/pixels"
            scale = {"mean": np.array(spec.mean, np.float32) * 255, "std": np.array(spec.std, np.float32) * 255}
            graph.initializer.extend(numpy_helper.from_array(value, f"{pixels}/{key}") for key, value in scale.items())
            nodes = [
                helper.make_node("Cast", [pixels], [f"{pixels}/float"], to=TensorProto.FLOAT),
                helper.make_node("Sub", [f"{pixels}/float", f"{pixels}/mean"], [f"{pixels}/centred"]),
                helper.make_node("Div", [f"{pixels}/centred", f"{pixels}/std"], [f"{pixels}/scaled"]),
                helper.make_node("Transpose", [f"{pixels}/scaled"], [graph.input[0].name], perm=[0, 3, 1, 2]),
            ]
            del graph.input[:]
            graph.input.append(_declared(TensorSpec(pixels, "UINT8", (-1, spec.height, spec.width, 3))))
        case TextInput(pair=None) if {"input_ids", "token_type_ids"} <= set(inputs):
            nodes = [helper.make_node("Sub", ["input_ids", "input_ids"], ["token_type_ids"])]
            graph.input.remove(inputs["token_type_ids"])
        case _:
            return model
    everything = [*nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(everything)
    return result


def _takes_channels(value: onnx.ValueInfoProto, spec: ImageInput) -> bool:
    sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]  # 0 where it is free
    expected = (0, 3, spec.height, spec.width)
    fits = len(sizes) == 4 and all(size in (0, other) for size, other in zip(sizes, expected, strict=True))
    return fits and bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def start(path: Path, model: onnx.ModelProto, *, optimize: bool = True) -> Session:
    """A session of a model as it came.

    Raises:
        ModelError: the runtime cannot load it; the message names operators that are not standard.
    """
    try:
        return Session(model.SerializeToString(), device="cpu", optimize=optimize)
    except ModelError as error:
        own = {(function.domain, function.name) for function in model.functions}
        foreign = [
            f"{node.domain}:{node.op_type} in {_called(node)}"
            for node in _nodes(model.graph)
            if node.domain not in (*_STANDARD, "ai.onnx") and (node.domain, node.op_type) not in own
        ]
        beyond = f" Its operators that are not standard: {'; '.join(foreign[:5])}." if foreign else ""
        raise ModelError(f"{path}: {error}{beyond}") from error


def exposed(model: onnx.ModelProto, values: Sequence[str]) -> onnx.ModelProto:
    """The same model, whose outputs are these of its values."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    result.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(values))
    return result


def before_activation(graph: onnx.GraphProto, output: str) -> tuple[str | None, str]:
    """The Softmax or Sigmoid that an output comes from, and the value that it takes; else None and the output."""
    makers = {name: node for node in graph.node for name in node.output}
    value = output
    while value in makers and makers[value].op_type in _PLAIN:
        value = makers[value].input[0]
    if value in makers and makers[value].op_type in ("Softmax", "Sigmoid"):
        return makers[value].op_type, makers[value].input[0]
    return None, output


def compiled(
    model: onnx.ModelProto, names: Mapping[str, str], inputs: Sequence[TensorSpec], heads: Mapping[str, Head]
) -> bytes:
    """The graph of a bundle: inputs and outputs by the names that it expects, and no node that they do not need.

    Args:
        model: as it came; it is left as it is.
        names: of its inputs -> as the bundle has them.
        inputs: what the bundle gives it.
        heads: by the output's name in the bundle.

    Raises:
        ModelError: the result is no valid graph.
    """
    result = exposed(model, [])
    graph = result.graph
    as_they_are: dict[str, str] = {}
    for name, head in heads.items():
        if not head.steps and head.value not in {*names, *as_they_are}:
            as_they_are[head.value] = name
    aside = {name: f"{name}/as it came" for name in _values(graph) & {*names.values(), *heads}}
    renames = {**aside, **names, **as_they_are}
    _rename(graph, renames)
    for name, head in heads.items():
        if as_they_are.get(head.value) != name:
            _append(graph, head.steps or [("Identity", {}, None)], renames.get(head.value, head.value), name)
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", head.columns]))
    prune(graph)
    del graph.input[:], graph.value_info[:]  # stale
    graph.input.extend(_declared(tensor) for tensor in inputs)
    result.ir_version = max(result.ir_version, 4)  # before it every weight was an input, too
    try:
        onnx.checker.check_model(result)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"the model cannot be made into the graph of a bundle: {error}") from error
    return bytes(result.SerializeToString())


def _values(graph: onnx.GraphProto) -> set[str]:
    made = {name for node in _nodes(graph) for name in (*node.input, *node.output)}
    return made | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}


def _rename(graph: onnx.GraphProto, renames: Mapping[str, str]) -> None:
    """In subgraphs, which see the values around them, too."""
    for node in graph.node:
        node.input[:] = [renames.get(name, name) for name in node.input]
        node.output[:] = [renames.get(name, name) for name in node.output]
        for subgraph in subgraphs(node):
            _rename(subgraph, renames)
    for value in (*graph.input, *graph.output):
        value.name = renames.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = renames.get(tensor.name, tensor.name)


def _append(graph: onnx.GraphProto, steps: Sequence[_Step], value: str, name: str) -> None:
    """Nodes that make of a value what is called `name`."""
    for place, (operator, attributes, constant) in enumerate(steps, start=1):
        inputs = [value]
        value = name if place == len(steps) else f"{name}/{place}"
        if constant is not None:
            inputs.append(f"{name}/{operator}")
            graph.initializer.append(numpy_helper.from_array(constant, inputs[1]))
        node = helper.make_node(operator, inputs, [value], f"{name}/{operator}")
        node.attribute.extend(helper.make_attribute(key, number) for key, number in attributes.items())
        graph.node.append(node)


def _declared(tensor: TensorSpec) -> onnx.ValueInfoProto:
    shape = ["batch", *("length" if size == -1 else size for size in tensor.shape[1:])]
    return helper.make_tensor_value_info(
        tensor.name, helper.np_dtype_to_tensor_dtype(NUMPY_TYPES[tensor.datatype]), shape
    )
