"""Bytes -> messages. Of a request for inference only what describes its tensors is parsed, once for all that are alike.

The requests of a client differ in their ids and tensors and in little else. What is left without these is the envelope;
whatever follows from its bytes alone is found out once, and kept with it.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from bundle.errors import BadInput
from protos import inference_pb2 as pb
from serve.inputs import count_strings, shared_bytes
from serve.parameters import RequestOptions, read_request

KEPT = 256  # envelopes, and as many plans of each model
MAX_FIELDS = 4096  # of a request: each tensor that it describes or brings is one, and each parameter
_LARGE = 4 << 10  # bytes; of an envelope that is not kept, as one with tensors in it
_MANY = 64  # fields of an envelope that is not kept either: as a message each takes many times its bytes
_SMALL = 64 << 10  # bytes; of a request whose tensors are copied, and then lie where the machine may expect them
_STRING = 400  # bytes that a string takes beside its own: as an object here, in the runtime, and on the way back
_LEAST = 2  # bytes of a message that a string has at least
_ID = 3 << 3 | 2  # the tag of id
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


class Envelope:
    """A request without its id and its raw contents.

    Attributes:
        message: as it came; its id and its raw contents are not to be read.
        model_name: that is asked for.
        model_version: the same; "" for the highest there is.
        shared_bytes: that the inputs take in shared memory, as they claim.
        strings: elements of the inputs of strings, as they claim.
        kept: whether requests that are alike have this same object.
    """

    def __init__(self, message: pb.ModelInferRequest, *, kept: bool) -> None:
        self.message, self.kept = message, kept
        self.model_name: str = message.model_name  # every look at a field of a message makes new objects
        self.model_version: str = message.model_version
        self.shared_bytes = shared_bytes(message)
        self.strings = count_strings(message)

    @cached_property
    def options(self) -> RequestOptions:
        """What it asks for beside its tensors; BadInput or NotSupported, if that cannot be."""
        return read_request(self.message.parameters)


class Request(NamedTuple):
    """One request for inference.

    Attributes:
        envelope: all but what follows.
        id: that comes back in the answer.
        raws: its raw_input_contents.
        size: bytes of the message, of what it claims in shared memory, and what its strings take beside them.
    """

    envelope: Envelope
    id: str
    raws: Raws
    size: int


def parse_request(data: bytes) -> Request:
    """A ModelInferRequest; of a large one the raw contents are views.

    Raises:
        BadInput: the bytes are no such message, or it has more than MAX_FIELDS.
    """
    parts = _split(data)
    if parts is None:
        message = _parse(data)
        if max(map(len, (message.raw_input_contents, message.inputs, message.outputs))) > MAX_FIELDS:
            raise _too_many()
        envelope, name, raws = Envelope(message, kept=False), message.id, list(message.raw_input_contents)
    else:
        others, name, raws = parts
        rest = b"".join(others)
        kept = len(rest) < _LARGE and len(others) <= _MANY
        envelope = _kept(rest) if kept else Envelope(_parse(rest), kept=False)
    size = len(data) + envelope.shared_bytes
    return Request(envelope, name, raws, size + _STRING * min(envelope.strings, size // _LEAST))


@lru_cache(KEPT)
def _kept(data: bytes) -> Envelope:
    return Envelope(_parse(data), kept=True)


def _too_many() -> BadInput:
    return BadInput(f"the request has more than {MAX_FIELDS} tensors and parameters; expected fewer.")


def _split(data: bytes) -> tuple[list[bytes | memoryview], str, list[bytes | memoryview]] | None:
    """All other fields, in their order, the id and the raw contents; None: there is what only protobuf knows to read.

    https://protobuf.dev/programming-guides/encoding: a message is a row of fields, each a tag (number << 3 | wire type)
    and, for this wire type, a length and so many bytes. Tags of fields up to 15 are one byte.
    """
    size = len(data)
    view = data if size < _SMALL else memoryview(data)
    name, position = "", 0
    others: list[bytes | memoryview] = []
    raws: list[bytes | memoryview] = []
    for _ in range(MAX_FIELDS + 1):
        if position == size:
            return others, name, raws
        tag = data[position]
        if tag & 7 != _LENGTH or not 0 < tag >> 3 < 16:
            return None
        start = position + 2
        if position + 1 < size and data[position + 1] < 128:
            end = start + data[position + 1]
        else:
            length, start = _read_varint(data, position + 1)
            end = start + length
        if not 0 < start <= end <= size:
            return None
        if tag == _RAW:
            raws.append(view[start:end])
        elif tag == _ID:
            try:
                name = data[start:end].decode()
            except UnicodeDecodeError:
                return None
        else:
            others.append(view[position:end])
        position = end
    raise _too_many()


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A length of at most 28 bits, and where what follows it begins; 0, if it is longer or cut off."""
    value = 0
    for index, byte in enumerate(data[position : position + 4]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, position + index + 1
    return 0, 0


def varint(number: int) -> bytes:
    """A length, as protobuf writes it."""
    if number < 128:
        return bytes((number,))
    return bytes((number & 127 | 128,)) + varint(number >> 7)
