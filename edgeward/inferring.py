"""`edgeward infer`."""

import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import BadZipFile

import numpy as np
from cyclopts import Parameter

from bundle.errors import BadInput
from bundle.tensor import NUMPY_TYPES, TensorSpec, conform
from edgeward.result import give

if TYPE_CHECKING:
    from serve.client.columns import Raws

MOST_VALUES = 4  # of one output that the table shows; --json gives all


def _check_inputs(kind: Any, inputs: tuple[str, ...]) -> None:
    """Refuse what was meant as an option: inputs may begin with a hyphen, for stdin and negative numbers."""
    for value in inputs:
        if re.match("--?[A-Za-z]", value):
            raise ValueError(f"There is no option {value!r}. A text that begins so can be read from a file or stdin.")


def infer(
    address: str,
    model: str,
    inputs: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True, validator=_check_inputs)],
    *,
    timeout_s: float = 30.0,
    tls: bool = False,
    tls_ca: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    token_file: Path | None = None,
    json: bool = False,
) -> None:
    """Send raw examples to a bundle on a running server.

    Args:
        address: HOST:PORT, or unix:PATH of a socket.
        model: name that it is served under.
        inputs: each the path of a file, "-" for stdin, or else the text itself. A model of two texts takes two inputs
            for each example. A model of vectors takes numbers with commas between them, files with such a line for
            each example, .npy files, and .npz files, of these the array of the input's name, their only one, or x. A
            model of tensors takes .npz files with an array for each input.
        timeout_s: of the call, in seconds.
        tls: speak TLS; so do the options that follow. The public authorities are trusted unless --tls-ca is given.
        tls_ca: PEM certificates of those who sign the server's.
        tls_cert: PEM certificate chain to show to a server that asks for one; with --tls-key.
        tls_key: PEM private key of it.
        token_file: bearer token, in its first line that is neither empty nor a comment. It is sent over TLS, or to this
            machine.
        json: give the answers as one JSON object.
    """
    from rich.table import Table  # what a server does not need

    from serve.client import Client, Tls

    files = Tls(tls_ca, tls_cert, tls_key) if tls or tls_ca or tls_cert or tls_key else None
    token = None if token_file is None else _first_token(token_file)
    with Client(address, timeout_s=timeout_s, tls=files, token=token) as client:
        takes = client.metadata(model)
        examples: Raws
        match takes.examples:
            case "vector":
                examples, shown = _vectors(inputs, takes.inputs[0])
            case "tensors":
                examples, shown = _tensors(inputs, takes.inputs)
            case "pair":
                examples, shown = _pairs(inputs, *(spec.name for spec in takes.inputs))
            case "raw":
                examples, shown = [_raw(value) for value in inputs], list(inputs)
            case None:
                wanted = ", ".join(f"{spec.name!r} {spec}" for spec in takes.inputs)
                raise BadInput(
                    f"model {model!r} takes no raw examples but {wanted}, and this command sends raw examples alone. "
                    "Send tensors from Python, with infer of serve.client.Client."
                )
        answers = client.predict(model, examples)
    table = Table()
    table.add_column("input")
    for name in answers:
        table.add_column(name)
    for row, value in enumerate(shown):
        table.add_row(value, *(_cell(array[row]) for array in answers.values()))
    give(answers, table, json=json)


def _first_token(path: Path) -> str:
    lines = (line.strip() for line in path.read_text(errors="replace").splitlines())
    token = next((line for line in lines if line and not line.startswith("#")), None)
    if token is None:
        raise BadInput(f"{path} holds no token.")
    return token


def _raw(value: str) -> bytes:
    if value == "-":
        return sys.stdin.buffer.read()
    return Path(value).read_bytes() if _is_file(value) else value.encode()


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # a long text is not a path
        return False


def _pairs(inputs: tuple[str, ...], first: str, second: str) -> tuple[list[tuple[bytes, bytes]], list[str]]:
    if len(inputs) % 2:
        raise BadInput(
            f"the model takes pairs, {first!r} and {second!r}: two inputs for each example; got {len(inputs)}."
        )
    sides = list(zip(inputs[::2], inputs[1::2], strict=True))
    return [(_raw(a), _raw(b)) for a, b in sides], [f"{a} | {b}" for a, b in sides]


def _vectors(inputs: tuple[str, ...], spec: TensorSpec) -> tuple[np.ndarray, list[str]]:
    """Vectors (N, numbers), and what each is called in the table."""
    size = spec.shape[1]
    parts, shown = [np.zeros((0, size), np.float32)], []
    for value in inputs:
        rows = _read_vectors(value, spec.name)
        if rows.dtype.kind not in "biuf" or rows.ndim != 2 or rows.shape[1] != size:
            raise BadInput(
                f"input {value!r} is {rows.dtype} {list(rows.shape)}; the model takes vectors of {size} numbers."
            )
        parts.append(rows)
        shown += [value] if len(rows) == 1 else [f"{value}, vector {row}" for row in range(len(rows))]
    return np.concatenate(parts), shown


def _tensors(inputs: tuple[str, ...], specs: tuple[TensorSpec, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """An array for each input, their rows those of all files, and what each example is called in the table."""
    parts = {spec.name: [np.zeros((0, *spec.shape[1:]), NUMPY_TYPES[spec.datatype])] for spec in specs}
    shown = []
    for value in inputs:
        arrays = _read_arrays(Path(value), specs)
        for name, array in arrays.items():
            parts[name].append(array)
        shown += [f"{value}, example {row}" for row in range(len(arrays[specs[0].name]))]
    return {name: np.concatenate(rows) for name, rows in parts.items()}, shown


def _read_arrays(path: Path, specs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    with _opened(path) as loaded:
        wanted = ", ".join(f"{spec.name!r} {spec}" for spec in specs)
        names = [] if isinstance(loaded, np.ndarray) else list(loaded)
        if not {spec.name for spec in specs} <= set(names):
            raise BadInput(f"{path} has {', '.join(names) or 'no named arrays'}; the model takes {wanted}.")
        arrays = {spec.name: conform(loaded[spec.name], spec, f"array {spec.name!r} of {path}") for spec in specs}
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{len(array)} {name!r}" for name, array in arrays.items())
        raise BadInput(f"the arrays of {path} differ in rows: {lengths}.")
    return arrays


def _read_vectors(value: str, name: str) -> np.ndarray:
    if Path(value).suffix in (".npy", ".npz"):
        array = _read_array(Path(value), name)
        return array[None] if array.ndim == 1 else array
    lines = _raw(value).decode(errors="replace").splitlines()
    try:
        return np.array([[float(number) for number in line.split(",")] for line in lines if line.strip()])
    except ValueError as error:  # also of lines that differ in length
        raise BadInput(
            f"input {value!r} is neither a file nor numbers with commas between them: {error}. The model takes vectors."
        ) from error


def _read_array(path: Path, name: str) -> np.ndarray:
    with _opened(path) as loaded:
        if isinstance(loaded, np.ndarray):
            return loaded
        names = list(loaded)
        found = next((one for one in (name, "x") if one in names), None) or (names[0] if len(names) == 1 else None)
        if found is None:
            raise BadInput(f"{path} has no array {name!r} or 'x', only {', '.join(names) or 'none'}.")
        array: np.ndarray = loaded[found]
        return array


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """What numpy makes of a file: an array, or several by name."""
    try:
        with path.open("rb") as file:
            yield np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise BadInput(f"{path} cannot be read as arrays: {error}.") from error


def _cell(values: np.ndarray) -> str:
    if len(values) > MOST_VALUES:
        return f"{values.max():.4g} (highest of {len(values)})"
    return " ".join(v.decode(errors="replace") if isinstance(v, bytes) else f"{v:.4g}" for v in values.tolist())
