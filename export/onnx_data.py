"""The data of a user's own ONNX model: its tensors, or raw examples, and labels in the order of its columns."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import numpy as np

from bundle import preprocess, tensors
from bundle.errors import BadInput, DataError, ModelError
from bundle.log import log
from bundle.manifest import (
    ImageInput,
    Input,
    Multiclass,
    Multilabel,
    NamedTensor,
    Regression,
    Task,
    TensorsInput,
    TextInput,
    VectorInput,
    WordsInput,
)
from bundle.tensor import TensorSpec, conform
from finetune import npz
from finetune.checkpoint_model import modality_of
from finetune.data import Dataset, digest, load_dataset
from finetune.labels import LabelColumn
from finetune.target import Target

ANSWERS = ({"0", "1"}, {"false", "true"})  # to what one column asks


def read_arrays(path: Path, inputs: Sequence[TensorSpec], outputs: Collection[str]) -> tuple[TensorsInput, Dataset]:
    """Examples of tensors and their labels, from the arrays of an .npz.

    Args:
        path: of the file. It has an array for each input, and labels as `y`, or called as the output that they are of;
            their kinds are those of finetune.npz.
        inputs: of the model; the first axis is the batch.
        outputs: of the model.

    Raises:
        DataError: an array is missing, of another shape or type, or holds what is no number.
    """
    there = npz.array_names(path)
    missing = ", ".join(f"{spec.name!r} {spec}" for spec in inputs if spec.name not in there)
    if missing:
        raise DataError(f"{path} has no array for the input {missing}; its arrays are {', '.join(there) or '(none)'}.")
    columns = [name for name in outputs if name in there] or [npz.LABEL]
    if columns[0] not in there:
        called = ", ".join(map(repr, outputs))
        raise DataError(f"{path} has no array {npz.LABEL!r} of labels, nor one called as an output, {called}.")
    arrays = npz.load_arrays(path, [*(spec.name for spec in inputs), *columns])
    try:
        given = {spec.name: conform(arrays[spec.name], spec, f"array {spec.name!r}") for spec in inputs}
        spec = TensorsInput(
            tensors=tuple(
                NamedTensor(name=one.name, datatype=one.datatype, shape=given[one.name].shape[1:])  # type: ignore[arg-type]
                for one in inputs
            )
        )
    except (BadInput, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
    raws = tensors.encode(given, spec)
    labels = [npz.array_target(path, LabelColumn(name, None, 1.0), arrays[name]) for name in columns]
    names = [f"example {i}" for i in range(len(raws))]
    _refuse_bad(path, names, raws, spec, labels)
    targets = tuple(target for target, _ in labels)
    hashes = [hashlib.sha256(raw).hexdigest() for raw in raws]
    return spec, Dataset(
        location=str(path),
        input_columns=tuple(given),
        label_columns=tuple(columns),
        names=names,
        hashes=hashes,
        targets=targets,
        weights=(1.0,) * len(targets),
        sha256=digest(hashes, targets),
        held_out=None,
        feature_names=(),
        _raw=raws.__getitem__,
    )


def _refuse_bad(
    path: Path,
    names: Sequence[str],
    raws: Sequence[bytes],
    spec: TensorsInput,
    labels: Sequence[tuple[Target, dict[int, str]]],
) -> None:
    for i, raw in enumerate(raws):
        try:
            tensors.decode(raw, spec)
        except BadInput as error:
            raise DataError(f"{names[i]} of {path}: {error}") from error
        for target, bad in labels:
            if i in bad:
                raise DataError(f"{names[i]} of {path} {bad[i]}.")
            if not target.known[i]:
                raise DataError(f"{names[i]} of {path} has no {target.name!r}.")


def read_preprocessing(path: Path) -> tuple[Input, dict[str, bytes]]:
    """The input of a manifest from a JSON file, and what it reads beside it, by name.

    Raises:
        DataError: it, or one of the files, cannot be read.
    """
    files: dict[str, bytes] = {}

    def read(name: str) -> bytes:
        files[name] = (path.parent / name).read_bytes()
        return files[name]

    try:
        spec = msgspec.json.decode(path.read_bytes(), type=Input)
        preprocess.encoder(spec, read)
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"--preprocess {path} is not the input of a manifest, with its files: {error}") from error
    return spec, files


def read_raw(data: str, spec: Input) -> Dataset:
    """Labelled raw examples as fine-tuning reads them, in the columns that the input names."""
    columns: tuple[str, ...]
    match spec:
        case TextInput(pair=str(pair)):
            columns = spec.column, pair
        case VectorInput():
            columns = spec.names or ((spec.column,) if data.endswith(npz.SUFFIX) else ())
        case TextInput() | ImageInput() | WordsInput():
            columns = (spec.column,)
        case _:
            columns = ()
    return load_dataset(data, modality_of(spec), input_column=columns)


def input_names(path: Path, inputs: Sequence[TensorSpec], spec: Input) -> dict[str, str]:
    """A model's inputs -> what the bundle's graph calls them; a single one may be called anything.

    Raises:
        ModelError: the model takes something else than preprocessing gives.
    """
    expected = preprocess.graph_inputs(spec)
    names = {one.name: one.name for one in inputs}
    if len(inputs) == len(expected) == 1:
        names = {inputs[0].name: expected[0].name}
    found = {names[one.name]: one for one in inputs}
    if any(one.name not in found or not _fits(found[one.name], one) for one in expected) or len(found) > len(expected):
        takes, gives = (", ".join(f"{one.name!r} {one}" for one in each) for each in (inputs, expected))
        raise ModelError(
            f"{path} takes {takes}; the {spec.__struct_config__.tag} preprocessing gives {gives}. Export the model "
            "so, or change the file of --preprocess (docs/bundle-format.md, Starting)."
        )
    return names


def _fits(model: TensorSpec, given: TensorSpec) -> bool:
    return (
        model.datatype == given.datatype
        and len(model.shape) == len(given.shape)
        and all(size in (-1, other) for size, other in zip(model.shape, given.shape, strict=True))
    )


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels of a file, one a line.

    Raises:
        DataError: it cannot be read, is empty, or has a line that is empty or there twice.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the labels {path} cannot be read: {error}.") from error
    labels = [line.strip() for line in lines]
    twice = next((label for label in labels if labels.count(label) > 1 or not label), None)
    if not labels or twice is not None:
        raise DataError(f"{path} must have a label on each line, each once; {twice or 'an empty line'!r} is not that.")
    return tuple(labels)


def task_of(target: Target, where: str, columns: int, labels: tuple[str, ...] | None) -> tuple[Task, Target]:
    """A task of as many columns as the model gives, and its target in their order.

    Whole numbers are places of columns, and text is looked up in the labels; without these the labels are the numbers
    of the columns, or in alphabetical order where there is one for each column.

    Args:
        target: as it was read.
        where: what the errors call it.
        columns: of the model's output.
        labels: one for each column.

    Raises:
        DataError: the target is not what such an output answers.
    """
    if labels is not None and (target.kind == "regression" or len(labels) != columns):
        raise DataError(f"--labels names {len(labels)} columns; {where} is {target.kind}, for an output of {columns}.")
    if target.kind == "regression":
        if columns != 1:
            raise DataError(f"{where} holds floats, and the model gives {columns} columns: labels are whole numbers.")
        return Regression(name=target.name, mean=0.0, std=1.0), target
    if target.kind == "multiclass" and columns == 1:
        target = _yes_or_no(target, where, labels)
    else:
        target = _in_columns(target, where, columns, labels)
    if target.kind == "multiclass":
        return Multiclass(name=target.name, labels=target.labels), target
    return Multilabel(name=target.name, labels=target.labels), target


def _yes_or_no(target: Target, where: str, labels: tuple[str, ...] | None) -> Target:
    """One column answers whether one label holds."""
    if not any(set(target.labels) <= answers for answers in ANSWERS):
        raise DataError(
            f"{where} has the labels {', '.join(target.labels[:5])}, and the model gives one column. "
            "For yes or no give 0 and 1, for a number floats."
        )
    yes = [label in ("1", "true") for label in target.labels]
    values = np.where(target.known, np.array([*yes, False])[target.values], np.nan).astype(np.float32)
    return Target(target.name, "multilabel", labels or ("1",), values[:, None])


def _in_columns(target: Target, where: str, columns: int, labels: tuple[str, ...] | None) -> Target:
    names, places = _places(target, where, columns, labels)
    if target.kind == "multiclass":
        return Target(
            target.name, target.kind, names, np.where(target.known, np.array([*places, -1])[target.values], -1)
        )
    values = np.zeros((len(target), columns), np.float32)
    values[:, places] = target.values
    values[~target.known] = np.nan
    return Target(target.name, target.kind, names, values)


def _places(
    target: Target, where: str, columns: int, labels: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[int]]:
    """The labels of all columns, and the column of each label of the target."""
    numbers = tuple(map(str, range(columns)))
    names = labels or numbers
    found = target.labels
    is_matrix = target.kind == "multilabel" and found == tuple(map(str, range(len(found))))
    if is_matrix and len(found) != columns:
        raise DataError(f"{where} has {len(found)} columns, and the model gives {columns}.")
    if set(found) <= set(names):
        return names, [names.index(label) for label in found]
    if set(found) <= set(numbers):
        return names, [int(label) for label in found]
    if labels is None and len(found) == columns and not all(label.isdecimal() for label in found):
        log.info("the columns of the model are taken to be the labels in alphabetical order", labels=found)
        return found, list(range(columns))
    unknown = next(label for label in found if label not in names)
    hint = "the labels that --labels names" if labels else "--labels FILE says which label is which"
    raise DataError(f"{where} has the label {unknown!r}, and the model {columns} columns: {hint}.")
