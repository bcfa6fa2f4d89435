"""The `parameters` of requests and tensors: which mean something, which are ignored, which are refused."""

from collections.abc import Mapping

from bundle.errors import BadInput
from protos import inference_pb2 as pb
from serve.errors import NotSupported

_TYPES = {  # parameters whose type is fixed; any other key is the client's own
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param", "uint64_param"),
    "sequence_id": ("int64_param", "uint64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "triton_enable_empty_final_response": ("bool_param",),
}


def check_request(parameters: Mapping[str, pb.InferParameter]) -> None:
    """Accept what a request may say beside its tensors; `priority` and `timeout` order nothing yet.

    Raises:
        BadInput: a parameter has no value, one of another type, or a name that is reserved.
        NotSupported: it asks for a sequence.
    """
    for key, parameter in parameters.items():
        value = _value(key, parameter)
        if key.startswith("triton_") and key not in _TYPES:
            raise BadInput(f"parameter {key!r} is reserved; expected no triton_ parameter that is not documented.")
        if key in ("priority", "timeout") and int(value) < 0:
            raise BadInput(f"parameter {key!r} is {value}; expected no negative number.")
        if key.startswith("sequence_") and key in _TYPES and value:
            raise NotSupported(f"parameter {key!r}: sequences are not supported.")


def check_tensor(parameters: Mapping[str, pb.InferParameter], where: str) -> None:
    """Accept what a tensor may say beside its name and shape.

    Raises:
        BadInput: a parameter has no value.
        NotSupported: it asks for shared memory or a classification.
    """
    for key, parameter in parameters.items():
        _value(key, parameter)
        if key.startswith("shared_memory_"):
            raise NotSupported(f"{where} has parameter {key!r}: shared memory is not supported; send the bytes.")
        if key == "classification":
            raise NotSupported(f"{where} has parameter {key!r}: the classification extension is not supported.")


def _value(key: str, parameter: pb.InferParameter) -> bool | int | str | float:
    choice = parameter.WhichOneof("parameter_choice")
    if choice is None:
        raise BadInput(f"parameter {key!r} has no value; expected one.")
    expected = _TYPES.get(key, (choice,))
    if choice not in expected:
        raise BadInput(f"parameter {key!r} is a {choice}; expected {' or '.join(expected)}.")
    value: bool | int | str | float = getattr(parameter, choice)
    return value
