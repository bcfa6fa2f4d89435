"""Bytes -> messages; of requests with large tensors only what describes these is parsed, and they are not copied."""

from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from bundle.errors import BadInput
from protos import inference_pb2 as pb

_SMALL = 64 << 10  # bytes; up to here protobuf is faster than a loop
_RAW = 7 << 3 | 2  # the tag of raw_input_contents
_LENGTH = 2  # the wire type of everything else that a ModelInferRequest has, too

Raws = Sequence[bytes | memoryview]


def parser(kind: str) -> Callable[[bytes], Any]:
    """Bytes -> a message of this kind; BadInput when they are none."""
    message = getattr(pb, kind)

    def parse(data: bytes) -> Any:
        try:
            return message.FromString(data)
        except DecodeError as error:
            raise BadInput(f"the bytes are no {kind}; expected a message of inference.proto.") from error

    return parse


_parse = parser("ModelInferRequest")


def parse_request(data: bytes) -> tuple[pb.ModelInferRequest, Raws]:
    """A request, and its raw_input_contents; of a large message these are views, and the request has none.

    Raises:
        BadInput: the bytes are no such message.
    """
    parts = None if len(data) < _SMALL else _split(data)
    if parts is None:
        request = _parse(data)
        return request, request.raw_input_contents
    envelope, raws = parts
    return _parse(envelope), raws


def _split(data: bytes) -> tuple[bytes, list[memoryview]] | None:
    """All other fields, in their order, and the raw contents; None: it has something that only protobuf knows to read.

    https://protobuf.dev/programming-guides/encoding: a message is a row of fields, each a tag (number << 3 | wire type)
    and, for this wire type, a length and so many bytes. Tags of fields up to 15 are one byte.
    """
    view, size = memoryview(data), len(data)
    others, raws, position = [], [], 0
    while position < size:
        tag = data[position]
        if tag & 7 != _LENGTH or not 0 < tag >> 3 < 16:
            return None
        length, start = _varint(data, position + 1)
        end = start + length
        if not 0 < start <= end <= size:
            return None
        if tag == _RAW:
            raws.append(view[start:end])
        else:
            others.append(view[position:end])
        position = end
    return b"".join(others), raws


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A length of at most 28 bits, and where what follows it begins; 0, if it is longer or cut off."""
    value = 0
    for index, byte in enumerate(data[position : position + 4]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, position + index + 1
    return 0, 0
