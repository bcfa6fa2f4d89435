"""The inputs of a request as arrays: each of them there, once, and of the datatype and a shape that the model takes."""

import math
from collections.abc import Collection, Sequence

import numpy as np

from bundle.errors import BadInput
from bundle.tensor import NUMPY_TYPES, TensorSpec
from protos import inference_pb2 as pb
from serve.parameters import read_input
from serve.shared_memory import Regions
from serve.tensors import Tensor, from_contents, from_raw

MAX_BYTES = 2**31 - 1  # of one tensor; no gRPC message is longer


def read_inputs(
    request: pb.ModelInferRequest, specs: Sequence[TensorSpec], optional: Collection[str], regions: Regions
) -> dict[str, np.ndarray]:
    """The arrays of a request, each of exactly the datatype and a shape that its spec allows.

    Args:
        request: as it came.
        specs: what the model takes.
        optional: names of inputs that may be left out.
        regions: shared memory that inputs may lie in.

    Returns:
        Arrays by name, read-only, little-endian; BYTES as objects that are bytes.

    Raises:
        BadInput: naming the input, what was expected and what came.
        EdgewardError: shared memory that an input lies in is not there.
    """
    _check_names([tensor.name for tensor in request.inputs], specs, optional)
    places = [read_input(tensor.parameters, f"input {tensor.name!r}").place for tensor in request.inputs]
    raws, sent = request.raw_input_contents, places.count(None)
    if raws and len(raws) != sent:
        beside = " outside shared memory" if sent < len(places) else ""
        raise BadInput(f"raw_input_contents has {len(raws)} entries for {sent} inputs{beside}; expected as many.")
    expected = {spec.name: spec for spec in specs}
    entries = iter(raws)
    arrays = {}
    for tensor, place in zip(request.inputs, places, strict=True):
        shape = _check_shape(tensor, expected[tensor.name])
        if place is None and not raws:
            arrays[tensor.name] = from_contents(tensor, shape)
            continue
        _check_no_contents(tensor, "it is in shared memory" if place else "the request has raw_input_contents")
        raw = regions.part(place.region, place.offset, place.byte_size).read() if place else next(entries)
        arrays[tensor.name] = from_raw(raw, tensor.datatype, shape, f"input {tensor.name!r}")
    return arrays


def _check_names(names: Sequence[str], specs: Sequence[TensorSpec], optional: Collection[str]) -> None:
    known = {spec.name: None for spec in specs}
    given = set(names)
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise BadInput(f"unexpected input {unknown!r}; the model takes {', '.join(map(repr, known)) or 'none'}.")
    if len(given) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(f"input {twice!r} is given {names.count(twice)} times; expected once.")
    missing = [name for name in known if name not in given and name not in optional]
    if missing:
        raise BadInput(
            f"input {', '.join(map(repr, missing))} is missing: expected {len(known)} inputs, got {len(names)}."
        )


def _check_no_contents(tensor: Tensor, because: str) -> None:
    if tensor.HasField("contents") and tensor.contents.ListFields():
        raise BadInput(f"input {tensor.name!r} has contents, but {because}; send one.")


def _check_shape(tensor: Tensor, spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    where = f"input {tensor.name!r}"
    if tensor.datatype != spec.datatype:
        raise BadInput(f"{where} has datatype {tensor.datatype!r}; expected {spec.datatype}.")
    if len(shape) != len(spec.shape) or any(want not in (-1, got) for want, got in zip(spec.shape, shape, strict=True)):
        raise BadInput(f"{where} has shape {list(shape)}; expected {list(spec.shape)}, where -1 is any length.")
    if any(size < 0 for size in shape):
        raise BadInput(f"{where} has shape {list(shape)}; expected no negative length.")
    claimed = math.prod(max(size, 1) for size in shape) * NUMPY_TYPES[spec.datatype].itemsize  # also beside a 0
    if claimed > MAX_BYTES:
        raise BadInput(f"{where} has shape {list(shape)}, which is {claimed} bytes; expected at most {MAX_BYTES}.")
    return shape
