"""What is served under one name and version: a bundle, a bundle's bare graph, or a plain ONNX graph."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bundle import preprocess
from bundle.errors import BadInput, ModelError
from bundle.host import cpu_count
from bundle.manifest import Regression, Task
from bundle.model import MAX_ROWS, Model, predict_logits
from bundle.outputs import answer_specs, answers, prefix
from bundle.session import Session
from bundle.tensor import NUMPY_TYPES, TensorSpec
from protos import inference_pb2 as pb
from serve.batch import Run
from serve.config import ServeConfig
from serve.errors import GateNotPassed
from serve.queue import Policy
from serve.spare import Spare

MAX_BATCH = 1024  # rows of one request to a bundle or to its bare graph

SHORT_BYTES = 32  # of a text: about the fewest tokens that one is padded to

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One thing that can be called: a request is decoded, requests are run together, each result is encoded.

    Attributes:
        name: that it is asked for by.
        version: the same.
        platform: as ModelMetadata says it.
        device: that it runs on.
        threads: of one run on the CPU.
        source: where it lies.
        inputs: what a request must bring; of `optional` it may bring.
        outputs: what an answer holds.
        optional: names of inputs that may be left out.
        labels: of the classes of an output, for the classification extension.
        max_batch: rows of one request; 0: no axis is known to be the batch.
        joins: whether requests may be joined to one run without changing an answer.
        policy: how requests wait and are joined.
        facts: what was gated, and how; parameters of ModelConfig.
        config: what a config.pbtxt said.
        decode: arrays of one request -> what `run` takes; raises BadInput.
        run: several decoded requests, padded to a number of rows or as they are -> a result for each.
        encode: one result -> outputs by name, BYTES as objects that are bytes or str.
        beside: gives what runs with one thread, if there is that.
        pads: whether joined texts are padded at a cost: only those of like length are joined then.
    """

    name: str
    version: int
    platform: Literal["edgeward_bundle", "onnxruntime_onnx"]
    device: Literal["cpu", "cuda", "tensorrt"]
    threads: int
    source: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    optional: frozenset[str] = frozenset()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_batch: int
    joins: bool
    policy: Policy
    facts: Mapping[str, str]
    config: pb.ModelConfig | None = None
    decode: Callable[[Arrays], Any] = field(repr=False)
    run: Run = field(repr=False)
    encode: Callable[[Any], dict[str, np.ndarray]] = field(repr=False)
    beside: Callable[[], Run | None] = field(repr=False)
    pads: bool = False

    def rows(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Of a request whose inputs have these shapes; 1 where no axis is known to be the batch.

        Raises:
            BadInput: there are too many, or the inputs differ.
        """
        if not self.max_batch:
            return 1
        for name, shape in shapes.items():
            if shape[0] > self.max_batch:
                raise BadInput(f"input {name!r} has {shape[0]} rows; expected at most {self.max_batch}.")
        if len({shape[0] for shape in shapes.values()}) > 1:
            rows = ", ".join(f"{name!r} has {shape[0]}" for name, shape in shapes.items())
            raise BadInput(f"the inputs differ in rows: {rows}; expected the same number.")
        return next((shape[0] for shape in shapes.values()), 1)

    def key(self, arrays: Arrays) -> Hashable:
        """Requests of one key may be joined to one run; with None it is neither joined nor padded."""
        if not self.max_batch or not arrays:  # a graph may need no input; then nothing says how many rows it runs
            return None
        if self.platform == "edgeward_bundle":  # whose rows are collated, whatever their length
            return _like_length(arrays) if self.pads else ()
        return tuple(sorted((name, array.shape[1:]) for name, array in arrays.items()))


def default_policy(config: ServeConfig, *, joins: bool, device: str, threads: int, fixed: bool = False) -> Policy:
    """How requests wait and are joined, where no config.pbtxt says it.

    Where a run takes more than half of the cores, a request without company has all its threads, and others run with
    one each, unless a number of either was asked for.

    Args:
        config: of the server.
        joins: whether joining changes no answer; where it may, it is done only when the config asks for it.
        device: that the model runs on; of a GPU every run takes all.
        threads: of one run on the CPU.
        fixed: somebody has said how many threads or instances there are to be.
    """
    most = (MAX_ROWS if joins else 1) if config.max_batch is None else config.max_batch
    cores = cpu_count() if device == "cpu" else 1
    at_once = max(1, cores // threads)
    splits = not fixed and config.instances is None and config.threads is None and at_once == 1 < cores
    return Policy(
        max_batch=most,
        max_delay_s=config.max_delay_ms / 1e3,
        sizes=tuple(sorted(config.batch_sizes)),
        max_queue=config.max_queue,
        instances=cores if splits else config.instances or at_once,
        joins_short=device == "cpu" and config.max_batch is None and not config.max_delay_ms,
        splits=splits,
    )


def served_bundle(model: Model, source: Path, policy: Policy, spare: Spare | None) -> ServedModel:
    """Raw examples in, answers out; `spare` is a session of the same graph."""
    manifest = model.manifest
    inputs = preprocess.wire_inputs(manifest.input)
    where = " and ".join(repr(spec.name) for spec in inputs)
    joined = policy.max_batch > 1  # an answer may then depend on its neighbours, where the variant's does

    def decode(arrays: Arrays) -> list[np.ndarray]:
        try:
            return model.rows(preprocess.raw_examples(manifest.input, arrays))
        except BadInput as error:
            raise BadInput(f"input {where}, {error}") from error

    def run_on(session: Session, requests: Sequence[list[np.ndarray]], size: int | None) -> list[dict[str, np.ndarray]]:
        rows = [row for request in requests for row in request]
        if not rows:
            return [model.logits(rows) for _ in requests]
        invariant = model.variant.batch_invariant or joined
        if invariant:  # else each runs alone, and padding would only be run, too
            rows += rows[-1:] * ((size or 0) - len(rows))
        logits = predict_logits(session, manifest.input, rows, batch_invariant=invariant)
        return _parted(logits, [len(request) for request in requests], len(rows))

    return ServedModel(
        name=manifest.name,
        version=manifest.version,
        platform="edgeward_bundle",
        device=model.session.device,
        threads=model.session.threads,
        source=source,
        inputs=inputs,
        outputs=answer_specs(manifest.tasks),
        labels=_labels(manifest.tasks),
        max_batch=MAX_BATCH,
        joins=model.variant.batch_invariant,
        policy=policy,
        facts=_facts(model),
        decode=decode,
        run=partial(run_on, model.session),
        encode=lambda logits: answers(manifest.tasks, logits),
        beside=_beside(run_on, spare),
        pads=preprocess.is_sequence(manifest.input) and model.session.device == "cpu",
    )


def _like_length(arrays: Arrays) -> int:
    """The same for texts whose longest ones differ by less than a fifth, or are short; it is known before decoding."""
    longest = max((len(text) for array in arrays.values() for text in array.flat), default=0)
    return round(4 * math.log2(max(longest, SHORT_BYTES)))


def bare_graph(model: Model, source: Path, policy: Policy, spare: Spare | None) -> ServedModel:
    """The bundle's graph without its preprocessing: tensors in, logits out."""
    manifest = model.manifest
    return replace(
        plain_graph(model.session, f"{manifest.name}.onnx", manifest.version, source, policy, spare),
        labels=_labels(manifest.tasks),
        max_batch=MAX_BATCH,
        joins=model.variant.batch_invariant,
        facts=_facts(model),
    )


def plain_graph(
    session: Session, name: str, version: int, source: Path, policy: Policy, spare: Spare | None
) -> ServedModel:
    """A graph that no gate has seen, as it is, and with no axis that is known to be the batch."""
    inputs = (*session.inputs, *session.optional)
    text = [spec.name for spec in inputs if spec.datatype == "BYTES"]

    def decode(arrays: Arrays) -> Arrays:
        return {**arrays, **{key: _decoded(arrays[key], key) for key in text if key in arrays}}

    def run_on(session: Session, requests: Sequence[Arrays], size: int | None) -> Sequence[dict[str, np.ndarray]]:
        if len(requests) == 1 and size is None:
            return [session.run(requests[0])]
        counts = [len(next(iter(request.values()))) for request in requests]
        joined = {name: _joined([request[name] for request in requests], size) for name in requests[0]}
        return _parted(session.run(joined), counts, len(next(iter(joined.values()))))

    def encode(result: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for spec in session.outputs:
            if result[spec.name].dtype != NUMPY_TYPES[spec.datatype]:
                raise ModelError(f"output {spec.name!r} is {result[spec.name].dtype}, not {spec.datatype}.")
        return result

    return ServedModel(
        name=name,
        version=version,
        platform="onnxruntime_onnx",
        device=session.device,
        threads=session.threads,
        source=source,
        inputs=inputs,
        outputs=session.outputs,
        optional=frozenset(spec.name for spec in session.optional),
        max_batch=0,
        joins=False,
        policy=policy,
        facts={"gate": "ungated"},
        decode=decode,
        run=partial(run_on, session),
        encode=encode,
        beside=_beside(run_on, spare),
    )


def _beside(run_on: Callable[..., Sequence[Any]], spare: Spare | None) -> Callable[[], Run | None]:
    def beside() -> Run | None:
        session = spare.get() if spare else None
        return partial(run_on, session) if session else None

    return beside


def _joined(arrays: Sequence[np.ndarray], size: int | None) -> np.ndarray:
    """The rows of all, and the last one as often as it takes to make `size`; where there are no rows, none."""
    missing = max((size or 0) - sum(map(len, arrays)), 0)
    last = next((array[-1:] for array in reversed(arrays) if len(array)), arrays[-1])
    padding = [np.repeat(last, missing, axis=0)] if missing else []
    return np.concatenate([*arrays, *padding])


def _parted(outputs: Mapping[str, np.ndarray], counts: Sequence[int], ran: int) -> list[dict[str, np.ndarray]]:
    """Outputs of joined requests, in parts of so many rows; what padding gave is left out.

    Raises:
        ModelError: an output has not the rows that were run, so that nobody knows whose they are.
    """
    for name, array in outputs.items():
        if array.shape[:1] != (ran,):
            raise ModelError(
                f"output {name!r} has shape {list(array.shape)} after a run of {ran} rows; expected as many. Where a "
                "graph's rows are not those of its inputs, requests can be neither joined nor padded."
            )
    ends = np.cumsum(counts).tolist()
    return [
        {name: array[end - count : end] for name, array in outputs.items()}
        for count, end in zip(counts, ends, strict=True)
    ]


def _decoded(array: np.ndarray, name: str) -> np.ndarray:
    decoded = np.empty(array.shape, object)  # the runtime takes str; of bytes it would take the repr
    for index, element in np.ndenumerate(array):
        try:
            decoded[index] = element.decode()
        except UnicodeDecodeError as error:
            raise BadInput(f"input {name!r}, element {list(index)}: expected UTF-8, got {error.reason}.") from error
    return decoded


def _labels(tasks: tuple[Task, ...]) -> dict[str, tuple[str, ...]]:
    """Of the outputs that have a column for each."""
    labelled = [(prefix(tasks, task), task.labels) for task in tasks if not isinstance(task, Regression)]
    return {f"{name}{output}": labels for name, labels in labelled for output in ("score", "logits")}


def _facts(model: Model) -> dict[str, str]:
    variant = model.variant
    unmeasured = "parity" if variant.precision == "fp32" else "ungated"
    gate = variant.gate.verdict if variant.gate else unmeasured
    return {"gate": gate, "variant": variant.name, "precision": variant.precision}


def check_gate(model: ServedModel) -> None:
    """Refuse what no gate has passed.

    Raises:
        GateNotPassed: it is a plain graph, or a variant whose accuracy was not shown to survive.
    """
    gate = model.facts["gate"]
    if gate not in ("PASS", "parity"):
        raise GateNotPassed(
            f"{model.source}: {model.name} version {model.version} is not served, because --require-gate asks for a "
            f"passed accuracy gate and its gate is {gate}. Export a bundle of it, or leave out --require-gate."
        )
