"""The weights of a serialised ONNX model, apart from its graph.

ONNX Runtime parses a model under Python's lock and copies its weights meanwhile: for each 100 MB no other thread of the
process runs for about 60 ms. Besides, a session keeps the bytes that it was made of. A graph without weights is small;
the runtime then copies the weights from where they lie in the model, without the lock. What it runs is the same.
"""

from collections.abc import Iterator

from bundle.errors import ModelError

SMALLEST = 4096  # bytes; smaller ones stay: shapes and the like, which the runtime needs when it reads the graph

# Numbers of fields in onnx.proto.
_GRAPH, _INITIALIZER, _NAME, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 7, 5, 8, 9, 13, 14
_KEY, _VALUE = 1, 2
_EXTERNAL = b"\x01"

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types, https://protobuf.dev/programming-guides/encoding


def without_weights(model: bytes, name: str) -> bytes:
    """The model with the data of every large weight replaced by where it lies in `model`, as if that were a file.

    Args:
        model: a serialised ONNX model.
        name: of that file; one that the model cannot know, or it could take any of its bytes for a weight.

    Raises:
        ModelError: the bytes are not protobuf, a weight already lies elsewhere, or one is listed twice.
    """
    try:
        _check_names(model)
        return b"".join(_message(model, 0, len(model), (_GRAPH, _INITIALIZER), name))
    except IndexError as error:
        raise ModelError("ONNX Runtime cannot load the graph: its bytes end too early.") from error


def _check_names(model: bytes) -> None:
    """Of two weights of one name the runtime takes the first where they are large, the last where they are small."""
    names = set()
    for name in _payloads(model, 0, len(model), (_GRAPH, _INITIALIZER, _NAME)):
        if name in names:
            shown = name.decode(errors="backslashreplace")
            raise ModelError(f"the graph lists weight {shown!r} more than once; which of them counts is not defined.")
        names.add(name)


def _payloads(data: bytes, start: int, end: int, path: tuple[int, ...]) -> Iterator[bytes]:
    """Of all fields that the path leads to."""
    if not path:
        yield data[start:end]
        return
    for number, _, payload, stop in _fields(data, start, end):
        if number == path[0]:
            yield from _payloads(data, payload, stop, path[1:])


def _message(data: bytes, start: int, end: int, path: tuple[int, ...], name: str) -> Iterator[bytes]:
    """The fields of a message, those that the path leads to without their weights."""
    if not path:
        yield from _tensor(data, start, end, name)
        return
    for number, first, payload, stop in _fields(data, start, end):
        if number == path[0]:
            yield _field(number, b"".join(_message(data, payload, stop, path[1:], name)))
        else:
            yield data[first:stop]


def _tensor(data: bytes, start: int, end: int, name: str) -> Iterator[bytes]:
    outside = False
    for number, first, payload, stop in _fields(data, start, end):
        if number == _EXTERNAL_DATA:
            raise ModelError("ONNX Runtime cannot load the graph: it does not hold its weights. Save them inside it.")
        if number == _RAW_DATA and stop - payload >= SMALLEST:
            outside = True
            where = {"location": name, "offset": str(payload), "length": str(stop - payload)}
            for key, value in where.items():
                yield _field(_EXTERNAL_DATA, _field(_KEY, key.encode()) + _field(_VALUE, value.encode()))
        else:
            yield data[first:stop]
    if outside:
        yield _varint(_DATA_LOCATION << 3 | _VARINT) + _EXTERNAL  # after what may be there: the last one counts


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each field its number, or 0 when it has no length, where it begins, where its payload does, and its end."""
    while start < end:
        tag, payload = _read_varint(data, start)
        kind = tag & 7
        if kind == _LENGTH:
            size, payload = _read_varint(data, payload)
            stop = payload + size
        elif kind == _VARINT:
            _, stop = _read_varint(data, payload)
        elif kind in (_FIXED32, _FIXED64):
            stop = payload + (4 if kind == _FIXED32 else 8)
        else:
            raise ModelError(f"ONNX Runtime cannot load the graph: its bytes are not protobuf at {start}.")
        if stop > end:
            raise IndexError
        yield tag >> 3 if kind == _LENGTH else 0, start, payload, stop
        start = stop


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ModelError(f"ONNX Runtime cannot load the graph: its bytes are not protobuf at {at}.")


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
