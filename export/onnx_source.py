"""A user's own ONNX model and its data, as what is compiled: the model as it came is the reference."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from onnx import ModelProto

from bundle import preprocess
from bundle.errors import DataError, GateFailed, ModelError
from bundle.log import log
from bundle.manifest import Input, Task
from bundle.outputs import logits_widths
from bundle.session import Session
from bundle.tensor import TensorSpec
from export import graph, onnx_graph
from export.config import ExportConfig
from export.onnx_data import input_names, read_arrays, read_labels, read_preprocessing, read_raw, task_of
from export.onnx_graph import Head
from export.source import SAMPLES, Source, Split, check_known, recollection
from finetune import npz
from finetune.data import Dataset
from finetune.loader import EncodedRows
from finetune.splits import SplitName, Splits, deal
from finetune.target import Kind, Target

FRACTIONS = (0.2, 0.0, 0.3, 0.5)  # calibration, none, selection, gate
SEED = 0
FEWEST = 20  # different examples, without which no split has enough
BATCH = 64  # examples that the reference takes at a time
HELD_OUT: tuple[SplitName, ...] = ("selection", "gate")

BAKED_IN = " Is a batch size baked in? Export the model with a batch axis of any size."
ACTIVATIONS: dict[Kind, tuple[str, ...]] = {  # that the answers of a task have anyway, or that change no order
    "multiclass": ("Softmax", "Sigmoid"),
    "multilabel": ("Sigmoid",),
    "regression": (),
}

Logits = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def open_onnx(config: ExportConfig) -> Source:
    """An ONNX model with the examples that it is held to, dealt to calibration, selection and gate by their content.

    Raises:
        ModelError: the model cannot be read or run, has a fixed batch, or does not take what its data is.
        DataError: the data does not fit the model, or is too little.
        GateFailed: the graph of the bundle is not the model.
    """
    path = config.checkpoint
    model, sha256 = onnx_graph.read_model(path)
    described = None if config.preprocess is None else read_preprocessing(config.preprocess)
    model = model if described is None else onnx_graph.adapted(model, described[0])
    started = onnx_graph.start(path, model)
    _check_batch(path, started.inputs)
    spec, files, dataset, names = _examples(config, started, described)
    encode = preprocess.encoder(spec, files.__getitem__)
    splits = _splits(dataset)
    sample = list(EncodedRows(dataset, splits.indices(dataset, "selection")[:SAMPLES], encode))
    heads = _heads(path, model, started, dataset.targets, _named(names, preprocess.collate(sample, spec)))
    tasks, targets = _tasks(config, dataset, heads)
    for name in HELD_OUT:
        check_known(name, targets, splits.indices(dataset, name))

    outputs = dict(zip(logits_widths(tasks), heads, strict=True))
    compiled = onnx_graph.compiled(model, names, preprocess.graph_inputs(spec), outputs)
    parity = _hold(path, compiled, _reference(path, model, heads, names, optimize=False), spec, tasks, sample)
    reference = _reference(path, model, heads, names)
    read = (msgspec.json.encode(spec), *files.values(), repr((heads, tasks)).encode())
    memory = recollection(config, dataset, sha256, *(hashlib.sha256(data).hexdigest() for data in read))

    def split(name: SplitName) -> Split:
        indices = splits.indices(dataset, name)
        log.info("reference", split=name, examples=len(indices))
        rows = EncodedRows(dataset, indices, encode)
        logits = memory.here().array("reference", name, compute=lambda: _logits(reference, rows, spec))
        return Split(rows, tuple(target.take(indices) for target in targets), logits, indices)

    calibration = np.random.default_rng(SEED).permutation(splits.indices(dataset, "train"))[: config.calibration]
    return Source(
        spec=spec,
        tasks=tasks,
        graph=compiled,
        parity=parity,
        calibration=EncodedRows(dataset, calibration, encode),
        selection=split("selection"),
        held_out=lambda: split("gate"),
        gate_size=len(splits.indices(dataset, "gate")),
        raw=dataset.raw,
        files=files,
        refit=None,
        reference="the original",
        model=path.name,
        data=dataset.location,
        data_sha256=dataset.sha256,
        sha256=sha256,
        memory=memory,
    )


def _hold(
    path: Path, compiled: bytes, reference: Logits, spec: Input, tasks: Sequence[Task], rows: Sequence[np.ndarray]
) -> graph.Parity:
    try:
        parity = graph.hold(compiled, reference, spec, tasks, rows)
    except GateFailed as error:
        raise GateFailed(f"the fp32 graph is not {path}: {error} Nothing was written.") from error
    log.info("parity", largest_difference=parity.served, tolerance=parity.tolerance)
    return parity


def _check_batch(path: Path, inputs: Sequence[TensorSpec]) -> None:
    for spec in inputs:
        if not spec.shape or spec.shape[0] != -1:
            raise ModelError(
                f"{path}: input {spec.name!r} has the fixed shape {list(spec.shape)}; its first axis must be a batch "
                "of any size. Export the model with it: torch.onnx.export(..., dynamic_shapes=...), "
                "tf2onnx --inputs with a first dimension of -1, skl2onnx FloatTensorType([None, D])."
            )


def _examples(
    config: ExportConfig, model: Session, described: tuple[Input, dict[str, bytes]] | None
) -> tuple[Input, dict[str, bytes], Dataset, dict[str, str]]:
    """What the model takes, files of preprocessing, the data, and the model's inputs -> their names in the bundle."""
    path = config.checkpoint
    if config.data is None:
        raise DataError(f"{path} is held to examples: give them with --data FILE.npz, an array for each input and y.")
    if described is not None:
        names = input_names(path, model.inputs, described[0])
        return *described, read_raw(config.data, described[0]), names
    data = Path(config.data).expanduser().resolve()
    if data.suffix.lower() != npz.SUFFIX or not data.is_file():
        raise DataError(f"{data} is no .npz file of tensors. For texts, images or tables give --preprocess FILE.json.")
    strings = [spec.name for spec in model.inputs if spec.datatype == "BYTES"]
    if strings:
        raise ModelError(f"{path}: input {strings[0]!r} takes strings; a bundle's graph takes numbers.")
    spec, dataset = read_arrays(data, model.inputs, [output.name for output in model.outputs])
    return spec, {}, dataset, {one.name: one.name for one in model.inputs}


def _splits(dataset: Dataset) -> Splits:
    different = len(set(dataset.hashes))
    if different < FEWEST:
        raise DataError(
            f"{dataset.location} has {different} different examples; comparing models takes {FEWEST} or more, and to "
            "show that a drop is small takes hundreds."
        )
    return Splits(
        data=dataset.location,
        data_sha256=dataset.sha256,
        input_columns=dataset.input_columns,
        label_columns=dataset.label_columns,
        seed=SEED,
        fractions=FRACTIONS,
        assignment=deal(dataset, FRACTIONS, seed=SEED),
    )


def _named(names: Mapping[str, str], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The bundle's tensors by the names of the model's inputs."""
    return {name: feeds[given] for name, given in names.items()}


def _heads(
    path: Path, model: ModelProto, started: Session, targets: Sequence[Target], feeds: Mapping[str, np.ndarray]
) -> tuple[Head, ...]:
    """Where the logits of each target are."""
    floats = [one.name for one in started.outputs if one.datatype in ("FP16", "FP32", "FP64")]
    heads = []
    for target in targets:
        if len(targets) == len(floats) == 1:
            output = floats[0]
        elif target.name in floats:
            output = target.name
        else:
            gives = ", ".join(f"{one.name!r} {one}" for one in started.outputs)
            raise ModelError(
                f"{path} gives {gives}: no output of floats is called {target.name!r}. Where there are several, call "
                "the labels of each as its output."
            )
        heads.append(_head(path, model, output, target, feeds))
    return tuple(heads)


def _head(path: Path, model: ModelProto, output: str, target: Target, feeds: Mapping[str, np.ndarray]) -> Head:
    activation, value = onnx_graph.before_activation(model.graph, output)
    if activation not in ACTIVATIONS[target.kind]:
        activation, value = None, output
    values = _run(path, onnx_graph.start(path, onnx_graph.exposed(model, [value])), feeds)[value]
    if values.ndim not in (1, 2) or values.dtype.kind != "f":
        raise ModelError(f"{path}: output {output!r} is {values.dtype} {list(values.shape)}; expected floats (N, C).")
    head = Head(output, activation, value, 1 if values.ndim == 1 else values.shape[1], values.ndim, values.dtype)
    if activation is not None:
        log.info("taken off: answers have it anyway", activation=activation, output=output, logits=value)
    elif target.kind != "regression" and values.min() >= 0 and values.max() <= 1:
        return _of_probabilities(path, head, target, values)
    return head


def _of_probabilities(path: Path, head: Head, target: Target, values: np.ndarray) -> Head:
    if target.kind == "multiclass" and head.columns > 1:
        if not np.allclose(values.sum(axis=1), 1, atol=1e-3):
            return head
        log.info("probabilities; their logarithms are the logits", output=head.output)
        return replace(head, probabilities=True)
    raise ModelError(
        f"{path}: output {head.output!r} lies between 0 and 1, and comes from no Sigmoid that could be taken off. "
        "Export the model without its last step: scores are the sigmoid of what it gives."
    )


def _tasks(
    config: ExportConfig, dataset: Dataset, heads: Sequence[Head]
) -> tuple[tuple[Task, ...], tuple[Target, ...]]:
    labels = None if config.labels is None else read_labels(config.labels)
    if labels is not None and len(heads) > 1:
        raise DataError(f"--labels {config.labels} is for a model of one output; this has {len(heads)}.")
    found = [
        task_of(target, f"{target.name!r} of {dataset.location}", head.columns, labels)
        for target, head in zip(dataset.targets, heads, strict=True)
    ]
    return tuple(task for task, _ in found), tuple(target for _, target in found)


def _reference(
    path: Path, model: ModelProto, heads: Sequence[Head], names: Mapping[str, str], *, optimize: bool = True
) -> Logits:
    """The model as it came, as a function from the bundle's tensors to logits float32 (N, columns of all tasks)."""
    session = onnx_graph.start(path, onnx_graph.exposed(model, [head.value for head in heads]), optimize=optimize)

    def logits(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        values = _run(path, session, _named(names, feeds))
        return np.concatenate([head.logits(values[head.value]) for head in heads], axis=1)

    return logits


def _run(path: Path, session: Session, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    count = len(next(iter(feeds.values())))
    try:
        values = session.run(feeds)
        wrong = {name: list(array.shape) for name, array in values.items() if array.shape[:1] != (count,)}
    except ModelError as error:
        raise ModelError(f"{path} cannot take {count} examples at once: {error}{BAKED_IN}") from error
    if wrong:
        raise ModelError(f"{path} gives {wrong} for {count} examples.{BAKED_IN}")
    return values


def _logits(reference: Logits, rows: Sequence[np.ndarray], spec: Input) -> np.ndarray:
    size = 1 if preprocess.is_sequence(spec) else BATCH  # a text alone needs no padding
    starts = range(0, len(rows), size)
    return np.concatenate([reference(preprocess.collate(rows[start : start + size], spec)) for start in starts])
