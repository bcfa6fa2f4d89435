"""Examples that a user chose, without labels: those of `--goldens FILE`."""

from pathlib import Path

import numpy as np

from bundle import tensors, text, vector
from bundle.errors import BadInput, DataError
from bundle.manifest import ImageInput, Input, TensorsInput, TextInput, VectorInput, WordsInput
from bundle.preprocess import Encode
from finetune import folder, npz
from finetune.table import Table, read_table

MOST = 64


def read_examples(path: Path, spec: Input, encode: Encode) -> list[bytes]:
    """Raw examples, at most MOST.

    Texts come from the columns of a table (CSV, JSONL, Parquet); images from a folder, at any depth, or from the paths
    in a table's column; vectors from a table's columns or the array `x` of an .npz; tensors from the arrays of their
    names in an .npz.

    Args:
        path: of the file or folder.
        spec: its columns, or tensors.
        encode: of the spec; every example must pass it.

    Raises:
        DataError: the file cannot be read, holds no example or too many, or one that cannot be used.
        MissingExtra: pyarrow is not installed.
    """
    raws = _read(path, spec)
    if not 1 <= len(raws) <= MOST:
        raise DataError(
            f"{path} holds {len(raws)} examples; 1 to {MOST} travel in a bundle as its golden examples. Choose fewer."
            if raws
            else f"{path} holds no example; a bundle needs at least one golden example."
        )
    for number, raw in enumerate(raws, start=1):
        try:
            encode(raw)
        except BadInput as error:
            raise DataError(f"example {number} of {path} cannot be a golden example: {error}") from error
    return raws


def _read(path: Path, spec: Input) -> list[bytes]:
    match spec:
        case ImageInput() if path.is_dir():
            return [file.read_bytes() for file in _images(path)]
        case ImageInput(column=column):
            return [_image(path.parent / name) for name in _strings(path, column)]
        case TextInput(column=first, pair=str(second)):
            sides = zip(_strings(path, first), _strings(path, second), strict=True)
            return [text.join_pair(*pair) for pair in sides]
        case TextInput(column=column) | WordsInput(column=column):
            return [value.encode() for value in _strings(path, column)]
        case VectorInput():
            return [vector.encode(row) for row in _vectors(path, spec)]
        case TensorsInput():
            return tensors.encode(_tensors(path, spec), spec)


def _images(path: Path) -> list[Path]:
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in folder.SUFFIXES and file.is_file()]
    return files[: MOST + 1]  # one more tells that there are too many


def _image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _strings(path: Path, column: str) -> list[str]:
    values = _whole(read_table(path, [column])).strings(column)
    missing = [row for row, value in enumerate(values, start=1) if value is None]
    if missing:
        raise DataError(f"{path} has no {column!r} in example {missing[0]}.")
    return [value for value in values if value is not None]


def _whole(table: Table) -> Table:
    if table.lost:
        raise DataError(f"{table.path} has rows that cannot be read: {table.lost[0]}.")
    return table


def _vectors(path: Path, spec: VectorInput) -> np.ndarray:
    """Numbers (N, spec.size)."""
    if path.suffix.lower() == npz.SUFFIX:
        vectors = npz.load_arrays(path, [npz.INPUT])[npz.INPUT]
    elif spec.names:
        table = _whole(read_table(path, [], spec.names))
        vectors = np.stack([table.numbers(name) for name in spec.names], axis=1)
    else:
        raise DataError(f"{path} is no .npz, and the model's {spec.size} numbers have no names to find them by.")
    if vectors.dtype.kind not in "biuf" or vectors.shape[1:] != (spec.size,):
        raise DataError(f"{path} holds {vectors.dtype} {list(vectors.shape)}; the model takes {spec.size} numbers.")
    return vectors


def _tensors(path: Path, spec: TensorsInput) -> dict[str, np.ndarray]:
    arrays = npz.load_arrays(path, [tensor.name for tensor in spec.tensors])
    row = tensors.row_dtype(spec)
    for name, array in arrays.items():
        expected = row[name].base, row[name].shape
        if (array.dtype, array.shape[1:]) != expected:
            raise DataError(
                f"array {name!r} of {path} is {array.dtype} {list(array.shape)}; the model takes {expected[0]} "
                f"{['examples', *expected[1]]}."
            )
    return arrays
