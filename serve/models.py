"""What is served under one name and version: a bundle, a bundle's bare graph, or a plain ONNX graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from bundle import preprocess
from bundle.errors import BadInput, ModelError
from bundle.model import Model
from bundle.outputs import answer_specs
from bundle.session import Session
from bundle.tensor import NUMPY_TYPES, TensorSpec
from serve.errors import StartError

MAX_BATCH = 1024  # rows of one request to a bundle or to its bare graph


@dataclass(frozen=True)
class ServedModel:
    """One thing that can be called."""

    name: str
    version: int
    platform: Literal["edgeward_bundle", "onnxruntime_onnx"]
    device: Literal["cpu", "cuda", "tensorrt"]
    source: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int  # rows; 0: no axis is known to be the batch
    run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = field(repr=False)
    facts: Mapping[str, str]  # what was gated, and how; parameters of ModelConfig

    def infer(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, BYTES as objects that are bytes or str.

        Args:
            arrays: every input, of the datatype and shape that `inputs` says.

        Raises:
            BadInput: there are too many rows, or an example cannot be used.
            ModelError: the runtime failed, or gave something else than `outputs` says.
        """
        for name, array in arrays.items():
            if self.max_batch and len(array) > self.max_batch:
                raise BadInput(f"input {name!r} has {len(array)} rows; expected at most {self.max_batch}.")
        if self.max_batch and len({len(array) for array in arrays.values()}) > 1:
            rows = ", ".join(f"{name!r} has {len(array)}" for name, array in arrays.items())
            raise BadInput(f"the inputs differ in rows: {rows}; expected the same number.")
        outputs = self.run(arrays)
        for spec in self.outputs:
            if outputs[spec.name].dtype != NUMPY_TYPES[spec.datatype]:
                raise ModelError(f"output {spec.name!r} is {outputs[spec.name].dtype}, not {spec.datatype}.")
        return outputs


def served_bundle(model: Model, source: Path) -> ServedModel:
    """Raw examples in, answers out."""
    manifest = model.manifest
    inputs = preprocess.wire_inputs(manifest.input)
    where = " and ".join(repr(spec.name) for spec in inputs)

    def run(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return model.predict(preprocess.raw_examples(manifest.input, arrays))
        except BadInput as error:
            raise BadInput(f"input {where}, {error}") from error

    return ServedModel(
        name=manifest.name,
        version=manifest.version,
        platform="edgeward_bundle",
        device=model.session.device,
        source=source,
        inputs=inputs,
        outputs=answer_specs(manifest.tasks),
        max_batch=MAX_BATCH,
        run=run,
        facts=_facts(model),
    )


def bare_graph(model: Model, source: Path) -> ServedModel:
    """The bundle's graph without its preprocessing: tensors in, logits out."""
    return ServedModel(
        name=f"{model.manifest.name}.onnx",
        version=model.manifest.version,
        platform="onnxruntime_onnx",
        device=model.session.device,
        source=source,
        inputs=model.session.inputs,
        outputs=model.session.outputs,
        max_batch=MAX_BATCH,
        run=model.session.run,
        facts=_facts(model),
    )


def plain_graph(session: Session, name: str, version: int, source: Path) -> ServedModel:
    """A graph that no gate has seen, as it is."""
    text = [spec.name for spec in session.inputs if spec.datatype == "BYTES"]

    def run(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return session.run({**arrays, **{key: _decode(arrays[key], key) for key in text}})

    return ServedModel(
        name=name,
        version=version,
        platform="onnxruntime_onnx",
        device=session.device,
        source=source,
        inputs=session.inputs,
        outputs=session.outputs,
        max_batch=0,
        run=run,
        facts={"gate": "ungated"},
    )


def _decode(array: np.ndarray, name: str) -> np.ndarray:
    decoded = np.empty(array.shape, object)  # the runtime takes str; of bytes it would take the repr
    for index, element in np.ndenumerate(array):
        try:
            decoded[index] = element.decode()
        except UnicodeDecodeError as error:
            raise BadInput(f"input {name!r}, element {list(index)}: expected UTF-8, got {error.reason}.") from error
    return decoded


def _facts(model: Model) -> dict[str, str]:
    variant = model.variant
    unmeasured = "parity" if variant.precision == "fp32" else "ungated"
    gate = variant.gate.verdict if variant.gate else unmeasured
    return {"gate": gate, "variant": variant.name, "precision": variant.precision}


def check_gate(model: ServedModel) -> None:
    """Refuse what no gate has passed.

    Raises:
        StartError: it is a plain graph, or a variant whose accuracy was not shown to survive.
    """
    gate = model.facts["gate"]
    if gate not in ("PASS", "parity"):
        raise StartError(
            f"{model.source}: {model.name} version {model.version} is not served, because --require-gate asks for a "
            f"passed accuracy gate and its gate is {gate}. Export a bundle of it, or leave out --require-gate."
        )
