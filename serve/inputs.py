"""The inputs of a request as arrays: each of them there, once, and of the datatype and a shape that the model takes."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from bundle.errors import BadInput
from bundle.tensor import NUMPY_TYPES, TensorSpec
from protos import inference_pb2 as pb
from serve.parameters import SharedPlace, read_input
from serve.shared_memory import Regions
from serve.tensors import Tensor, from_contents, from_raw

MAX_BYTES = 2**31 - 1  # of one tensor; no gRPC message is longer
_MAX_AXES = 64  # of numpy's arrays


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a request, but for its elements.

    Attributes:
        name: of the model's input.
        datatype: the model's.
        shape: one that the model takes.
        place: in shared memory, where its bytes are instead of the message.
        tensor: as it came.
        has_contents: whether there are typed contents in it.
        where: what the errors call it.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    place: SharedPlace | None
    tensor: Tensor
    has_contents: bool
    where: str


def describe_inputs(
    request: pb.ModelInferRequest, specs: Sequence[TensorSpec], optional: Collection[str]
) -> tuple[Input, ...]:
    """What a request says of its inputs, in its order, each of exactly the datatype and a shape that its spec allows.

    Args:
        request: as it came.
        specs: what the model takes.
        optional: names of inputs that may be left out.

    Raises:
        BadInput: naming the input, what was expected and what came.
    """
    expected = {spec.name: spec for spec in specs}
    _check_names([tensor.name for tensor in request.inputs], list(expected), optional)
    return tuple(_described(tensor, expected[tensor.name]) for tensor in request.inputs)


def read_inputs(inputs: Sequence[Input], raws: Sequence[bytes | memoryview], regions: Regions) -> dict[str, np.ndarray]:
    """The arrays of a request.

    Args:
        inputs: by describe_inputs.
        raws: raw_input_contents of the request; without any, the inputs have typed contents.
        regions: shared memory that inputs may lie in.

    Returns:
        Arrays by name, read-only, little-endian; BYTES as objects that are bytes.

    Raises:
        BadInput: naming the input, what was expected and what came.
        EdgewardError: shared memory that an input lies in is not there.
    """
    sent = [each.place for each in inputs].count(None)
    if raws and len(raws) != sent:
        beside = " outside shared memory" if sent < len(inputs) else ""
        raise BadInput(f"raw_input_contents has {len(raws)} entries for {sent} inputs{beside}; expected as many.")
    entries = iter(raws)
    arrays = {}
    for each in inputs:
        place = each.place
        if place is None and not raws:
            arrays[each.name] = from_contents(each.tensor, each.shape)
            continue
        if each.has_contents:
            other = "it is in shared memory" if place else "the request has raw_input_contents"
            raise BadInput(f"{each.where} has contents, but {other}; send one.")
        raw = regions.part(place.region, place.offset, place.byte_size).read() if place else next(entries)
        array = from_raw(raw, each.datatype, each.shape, each.where)
        arrays[each.name] = array if array.flags.aligned else array.copy()  # a view of a message can begin anywhere
    return arrays


def shared_bytes(request: pb.ModelInferRequest) -> int:
    """The bytes that a request takes beside its message: of inputs in shared memory, as it claims them.

    A claim beyond MAX_BYTES is not counted: `read_inputs` refuses it before it takes any.
    """
    key = "shared_memory_byte_size"
    sizes = [tensor.parameters[key] for tensor in request.inputs if key in tensor.parameters]
    claims = [max(size.int64_param, size.uint64_param, 0) for size in sizes]
    return sum(claim for claim in claims if claim <= MAX_BYTES)


def count_strings(request: pb.ModelInferRequest) -> int:
    """The elements of all inputs of strings, as they are claimed."""
    strings = [tensor for tensor in request.inputs if tensor.datatype == "BYTES"]
    return sum(math.prod(max(0, length) for length in tensor.shape) for tensor in strings)


def _described(tensor: Tensor, spec: TensorSpec) -> Input:
    where = f"input {spec.name!r}"
    return Input(
        name=spec.name,
        datatype=spec.datatype,
        shape=_checked_shape(tensor, spec),
        place=read_input(tensor.parameters, where).place,
        tensor=tensor,
        has_contents=tensor.HasField("contents") and bool(tensor.contents.ListFields()),
        where=where,
    )


def _check_names(names: Sequence[str], known: Sequence[str], optional: Collection[str]) -> None:
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise BadInput(f"unexpected input {unknown!r}; the model takes {', '.join(map(repr, known)) or 'none'}.")
    twice = next((name for name in known if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"input {twice!r} is given {names.count(twice)} times; expected once.")
    missing = [name for name in known if name not in names and name not in optional]
    if missing:
        raise BadInput(
            f"input {', '.join(map(repr, missing))} is missing: expected {len(known)} inputs, got {len(names)}."
        )


def _checked_shape(tensor: Tensor, spec: TensorSpec) -> tuple[int, ...]:
    where = f"input {spec.name!r}"
    if len(tensor.shape) > _MAX_AXES:
        raise BadInput(f"{where} has {len(tensor.shape)} axes; expected {list(spec.shape)}, where -1 is any length.")
    shape = tuple(tensor.shape)
    if tensor.datatype != spec.datatype:
        raise BadInput(f"{where} has datatype {tensor.datatype!r}; expected {spec.datatype}.")
    if shape != spec.shape and not _fits(shape, spec.shape):
        raise BadInput(f"{where} has shape {list(shape)}; expected {list(spec.shape)}, where -1 is any length.")
    if min(shape, default=0) < 0:
        raise BadInput(f"{where} has shape {list(shape)}; expected no negative length.")
    size = NUMPY_TYPES[spec.datatype].itemsize
    if not 0 < math.prod(shape) * size <= MAX_BYTES:
        claimed = math.prod(length or 1 for length in shape) * size  # also beside a length of 0
        if claimed > MAX_BYTES:
            raise BadInput(f"{where} has shape {list(shape)}, which is {claimed} bytes; expected at most {MAX_BYTES}.")
    return shape


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if len(shape) != len(expected):
        return False
    for want, got in zip(expected, shape, strict=True):  # noqa: SIM110 - a generator takes three times as long
        if want not in (-1, got):
            return False
    return True
