"""Feature vectors and labels from the arrays of an .npz file."""

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bundle.errors import DataError
from finetune.labels import LabelColumn, read_target
from finetune.source import Source, vector_content
from finetune.target import Kind, Target

SUFFIX = ".npz"
INPUT = "x"
LABEL = "y"


def read_npz(path: Path, inputs: tuple[str, ...], labels: Sequence[LabelColumn], given: tuple[str, ...]) -> Source:
    """Vectors of one array and targets of others, whose first axes are the examples.

    Args:
        path: of the file. Arrays of Python objects, which would be unpickled, are refused.
        inputs: the array of the vectors, numbers (N, D); () is "x".
        labels: arrays. Whole numbers, truth values and text (N,) are multiclass unless they have a kind, floats (N,)
            regression, numbers 0 and 1 (N, C) multilabel with the labels "0" to "C-1".
        given: the label columns as they were given.

    Raises:
        DataError: the file cannot be read, or lacks an array; arrays of other shapes, types or lengths.
    """
    name, *more = inputs or (INPUT,)
    if more:
        raise DataError(f"the vectors of an .npz are one array, not {len(inputs)}: {', '.join(inputs)}.")
    if name in [column.name for column in labels]:
        raise DataError(f"array {name!r} cannot be both input and label.")
    arrays = load_arrays(path, [name, *(column.name for column in labels)])
    vectors = _vectors(path, name, arrays[name])
    targets = []
    bad = _not_finite(name, vectors)
    for column in labels:
        target, wrong = array_target(path, column, arrays[column.name])
        targets.append(target)
        bad = wrong | bad
    digests, raw = vector_content(vectors)
    return Source(
        location=str(path),
        names=[f"{name}[{row}]" for row in range(len(vectors))],
        digests=digests,
        raw=raw,
        targets=tuple(targets),
        bad=bad,
        input_columns=(name,),
        label_columns=given,
        weights=tuple(column.weight for column in labels),
    )


def array_names(path: Path) -> list[str]:
    """What the arrays are called.

    Raises:
        DataError: the file cannot be read.
    """
    with _open(path) as file:
        return list(file.files)


@contextmanager
def _open(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        opened = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    with opened:
        try:
            file = np.load(opened, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} cannot be read as .npz: {error}.") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is a single array, not an .npz of several. Write it with numpy.savez.")
        with file:
            yield file


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some of the arrays, whose first axes are the examples.

    Raises:
        DataError: the file cannot be read, or lacks an array; one has no axis, or two differ in length.
    """
    arrays = {}
    with _open(path) as file:
        for name in names:
            if name not in file.files:
                raise DataError(f"{path} has no array {name!r}; its arrays are {', '.join(file.files) or '(none)'}.")
            try:
                arrays[name] = np.asarray(file[name])
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise DataError(f"array {name!r} of {path} cannot be read: {error}") from error
            if not arrays[name].ndim:
                raise DataError(f"array {name!r} of {path} is a single value, not one for each example.")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        several = ", ".join(f"{length} {name!r}" for name, length in lengths.items())
        raise DataError(f"the arrays of {path} are of differing lengths: {several}.")
    return arrays


def _vectors(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or not array.shape[1]:
        raise DataError(f"array {name!r} of {path} has shape {array.shape}, not (examples, features).")
    if array.dtype.kind not in "biuf":
        raise DataError(f"array {name!r} of {path} holds {array.dtype}, not numbers.")
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is found as that
        return array.astype("<f4")


def _not_finite(name: str, vectors: np.ndarray) -> dict[int, str]:
    wrong = ~np.isfinite(vectors)
    first = {row: int(wrong[row].argmax()) for row in np.flatnonzero(wrong.any(axis=1)).tolist()}
    return {row: f"has {vectors[row, position]} at position {position}" for row, position in first.items()}


def array_target(path: Path, column: LabelColumn, array: np.ndarray) -> tuple[Target, dict[int, str]]:
    """The target that an array holds, and what is wrong with single entries; see read_npz for the kinds.

    Raises:
        DataError: it has another shape or type.
    """
    name = column.name
    if array.dtype.kind not in "biufUS":
        raise DataError(f"array {name!r} of {path} holds {array.dtype}, neither numbers nor text.")
    if array.ndim == 2 and array.shape[1] == 1 and column.kind != "multilabel":
        array = array[:, 0]
    kind = column.kind or _kind(array)
    if array.ndim == 2 and kind == "multilabel" and array.dtype.kind in "biuf":
        return _indicators(name, array)
    if array.ndim != 1:
        raise DataError(f"array {name!r} of {path} has shape {array.shape}, which is no {kind} label.")
    if kind == "regression" and array.dtype.kind in "biuf":
        values = array.astype(np.float64)
        infinite = np.flatnonzero(np.isinf(values))
        values[infinite] = np.nan
        return Target(name, kind, (), values), {int(row): f"has {array[row]} as {name}" for row in infinite}
    return read_target(name, kind, _cells(path, name, array))


def _kind(array: np.ndarray) -> Kind:
    if array.ndim == 2:
        return "multilabel"
    return "regression" if array.dtype.kind == "f" else "multiclass"


def _indicators(name: str, array: np.ndarray) -> tuple[Target, dict[int, str]]:
    values = array.astype(np.float32)
    missing = np.isnan(values).all(axis=1)
    wrong = ((array != 0) & (array != 1)).any(axis=1) & ~missing
    bad = {int(row): f"has a {name} that is neither 0 nor 1" for row in np.flatnonzero(wrong)}
    values[wrong] = np.nan
    return Target(name, "multilabel", tuple(str(i) for i in range(array.shape[1])), values), bad


def _cells(path: Path, name: str, array: np.ndarray) -> list[str | None]:
    """Labels as text: whole numbers without a point, truth values as JSON writes them, NaN as None."""
    if array.dtype.kind == "b":
        return ["true" if value else "false" for value in array]
    if array.dtype.kind == "f":
        return [None if math.isnan(v) else str(int(v)) if v.is_integer() else str(v) for v in array.tolist()]
    if array.dtype.kind != "S":
        return [str(value) for value in array.tolist()]
    try:
        return [value.decode() for value in array.tolist()]
    except UnicodeDecodeError as error:
        raise DataError(f"array {name!r} of {path} holds text that is not UTF-8: {error}.") from error
