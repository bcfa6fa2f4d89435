"""The `parameters` of requests and tensors: which mean something, which are ignored, which are refused."""

from collections.abc import Mapping
from dataclasses import dataclass

from bundle.errors import BadInput
from protos import inference_pb2 as pb
from serve.errors import NotSupported

MAX_PARAMETERS = 1024  # of a request, and of each of its tensors

_INTEGER = ("int64_param", "uint64_param")
_TYPES = {  # of parameters that mean something; any other key is the client's own
    "priority": _INTEGER,
    "timeout": _INTEGER,
    "sequence_id": (*_INTEGER, "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "triton_enable_empty_final_response": ("bool_param",),  # without effect: every request has one response
    "classification": _INTEGER,
    "shared_memory_region": ("string_param",),
    "shared_memory_offset": _INTEGER,
    "shared_memory_byte_size": _INTEGER,
}

Parameters = Mapping[str, pb.InferParameter]
Value = bool | int | str | float


@dataclass(frozen=True)
class RequestOptions:
    """What a request says beside its tensors.

    Attributes:
        priority: 1 is the highest; 0: the model's default.
        timeout_s: in the queue; None: the model's default.
    """

    priority: int = 0
    timeout_s: float | None = None


@dataclass(frozen=True)
class SharedPlace:
    """Where in a registered region of shared memory; bytes."""

    region: str
    offset: int
    byte_size: int


@dataclass(frozen=True)
class TensorOptions:
    """What a tensor says beside its name and shape.

    Attributes:
        place: where its bytes are, or go to, instead of the message.
        classes: how many of the highest values are wanted, as text; 0: the tensor itself.
    """

    place: SharedPlace | None = None
    classes: int = 0


_PLAIN_REQUEST = RequestOptions()
_PLAIN_TENSOR = TensorOptions()


def read_request(parameters: Parameters) -> RequestOptions:
    """What a request asks for.

    Raises:
        BadInput: there are too many parameters, or one has no value, one of another type, or a name that is reserved.
        NotSupported: it asks for a sequence.
    """
    if not parameters:
        return _PLAIN_REQUEST
    values = _values(parameters)
    for key, value in values.items():
        if key.startswith("triton_") and key not in _TYPES:
            raise BadInput(f"parameter {key!r} is reserved; expected no triton_ parameter that is not documented.")
        if key in ("sequence_id", "sequence_start", "sequence_end") and value:
            raise NotSupported(f"parameter {key!r}: sequences are not supported.")
    timeout = _natural(values, "timeout")
    return RequestOptions(priority=_natural(values, "priority"), timeout_s=timeout / 1e6 if timeout else None)


def read_input(parameters: Parameters, where: str) -> TensorOptions:
    """What an input asks for: it may lie in shared memory.

    Args:
        parameters: of the tensor.
        where: what the errors call it.

    Raises:
        BadInput: there are too many parameters, or one has no value, another type than it should have, or does not
            belong here.
    """
    if not parameters:
        return _PLAIN_TENSOR
    values = _values(parameters, where)
    if "classification" in values:
        raise BadInput(f"{where} has parameter 'classification', which is expected of outputs only.")
    return TensorOptions(place=_place(values, where))


def read_output(parameters: Parameters, where: str) -> TensorOptions:
    """What is asked of an output: to be written to shared memory, or its highest values.

    Args:
        parameters: of the requested output.
        where: what the errors call it.

    Raises:
        BadInput: a parameter has no value or another type than it should have, or both are asked.
    """
    if not parameters:
        return _PLAIN_TENSOR
    values = _values(parameters, where)
    place, classes = _place(values, where), _natural(values, "classification", where)
    if "classification" in values and classes == 0:
        raise BadInput(f"{where} has parameter 'classification' 0; expected a positive number.")
    if place and classes:
        raise BadInput(f"{where} has 'classification' and 'shared_memory_region'; expected one of them.")
    return TensorOptions(place, classes)


def _place(values: Mapping[str, Value], where: str) -> SharedPlace | None:
    name = values.get("shared_memory_region")
    others = [key for key in ("shared_memory_offset", "shared_memory_byte_size") if key in values]
    if name is None:
        if others:
            raise BadInput(f"{where} has parameter {others[0]!r}; expected it beside 'shared_memory_region' only.")
        return None
    if "shared_memory_byte_size" not in values:
        raise BadInput(f"{where} has parameter 'shared_memory_region'; expected 'shared_memory_byte_size' beside it.")
    offset, size = (_natural(values, key, where) for key in ("shared_memory_offset", "shared_memory_byte_size"))
    return SharedPlace(str(name), offset, size)


def _natural(values: Mapping[str, Value], key: str, where: str = "") -> int:
    value = int(values.get(key, 0))
    if value < 0:
        raise BadInput(f"{_named(key, where)} is {value}; expected no negative number.")
    return value


def _values(parameters: Parameters, where: str = "") -> dict[str, Value]:
    if len(parameters) > MAX_PARAMETERS:
        raise BadInput(f"{where or 'the request'} has {len(parameters)} parameters; expected at most {MAX_PARAMETERS}.")
    return {key: _value(key, parameter, where) for key, parameter in parameters.items()}


def _value(key: str, parameter: pb.InferParameter, where: str) -> Value:
    choice = parameter.WhichOneof("parameter_choice")
    if choice is None:
        raise BadInput(f"{_named(key, where)} has no value; expected one.")
    expected = _TYPES.get(key, (choice,))
    if choice not in expected:
        raise BadInput(f"{_named(key, where)} is a {choice}; expected {' or '.join(expected)}.")
    value: Value = getattr(parameter, choice)
    return value


def _named(key: str, where: str) -> str:
    return f"{where}: parameter {key!r}" if where else f"parameter {key!r}"
