"""The outputs that a request asks for, and the answer that holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bundle.errors import BadInput
from bundle.tensor import TensorSpec
from protos import inference_pb2 as pb
from serve import classification
from serve.envelope import varint
from serve.parameters import SharedPlace, read_output
from serve.shared_memory import Part, Regions
from serve.tensors import to_raw

_ID = bytes([3 << 3 | 2])  # the tag of id
_RAW = bytes([6 << 3 | 2])  # of raw_output_contents


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that a request asks for.

    Attributes:
        spec: of the model's output.
        place: in shared memory, where its bytes go instead of the message.
        classes: how many of the highest values are to come as text; 0: the tensor itself.
    """

    spec: TensorSpec
    place: SharedPlace | None = None
    classes: int = 0


def read_outputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> tuple[Wanted, ...]:
    """What a request asks for, in its order; all that the model gives where it names none.

    Args:
        request: as it came.
        specs: what the model gives.

    Raises:
        BadInput: an output is unknown or named twice, or cannot come as it is asked for.
    """
    known = {spec.name: spec for spec in specs}
    wanted: dict[str, Wanted] = {}
    for output in request.outputs:
        if output.name not in known:
            raise BadInput(f"unexpected output {output.name!r}; the model gives {', '.join(map(repr, known))}.")
        if output.name in wanted:
            raise BadInput(f"output {output.name!r} already exists in request; expected once.")
        wanted[output.name] = _wanted(output, known[output.name])
    return tuple(wanted.values()) or tuple(Wanted(spec) for spec in specs)


def _wanted(output: pb.ModelInferRequest.InferRequestedOutputTensor, spec: TensorSpec) -> Wanted:
    options = read_output(output.parameters, f"output {output.name!r}")
    if options.classes:
        classification.check(spec)
    return Wanted(spec, options.place, options.classes)


def find_parts(wanted: Sequence[Wanted], regions: Regions) -> dict[str, Part]:
    """Of shared memory, by the outputs that are to go there.

    Raises:
        EdgewardError: a region is not there, or is smaller than that.
    """
    parts = {}
    for each in wanted:
        if (place := each.place) is not None:
            parts[each.spec.name] = regions.part(place.region, place.offset, place.byte_size)
    return parts


def write_answer(
    model: tuple[str, str],
    request_id: str,
    wanted: Sequence[Wanted],
    parts: Mapping[str, Part],
    arrays: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[str]],
    *,
    batched: bool,
) -> bytes:
    """A ModelInferResponse with what is wanted, in that order, raw; the same bytes that protobuf makes of it.

    An entry whose bytes went to shared memory is empty; the parameters of its output say where they are, and how many.

    Args:
        model: name and version.
        request_id: of the request.
        wanted: by read_outputs.
        parts: by find_parts.
        arrays: by name, of the dtypes of their specs; elements of BYTES are bytes or str.
        labels: by output and class, for the classification extension.
        batched: whether the first axis of every output is the batch.

    Raises:
        BadInput: shared memory does not hold an output.
    """
    outputs, raws = [], []
    for each in wanted:
        name, datatype, array = each.spec.name, each.spec.datatype, arrays[each.spec.name]
        if each.classes:
            array = classification.top_classes(array, each.classes, labels.get(name, ()), batched=batched)
            datatype = "BYTES"
        if each.place:
            outputs.append((name, datatype, array.shape, each.place.region, _moved(array, datatype, parts[name])))
            raw = b""
        else:
            outputs.append((name, datatype, array.shape, "", 0))
            raw = to_raw(array, datatype)
        raws += [_RAW, varint(len(raw)), raw]
    head, described = _described(model, tuple(outputs))
    own = request_id.encode()
    return b"".join([head, *([_ID, varint(len(own)), own] if own else ()), described, *raws])


def _moved(array: np.ndarray, datatype: str, part: Part) -> int:
    """The bytes that were written to shared memory."""
    return part.write(to_raw(array, datatype) if datatype == "BYTES" else np.ascontiguousarray(array).data)


@lru_cache(1024)  # most answers of a model are alike
def _described(
    model: tuple[str, str], outputs: tuple[tuple[str, str, tuple[int, ...], str, int], ...]
) -> tuple[bytes, bytes]:
    """What an answer has before its id, and what it has between that and the raw contents."""
    head, described = pb.ModelInferResponse(model_name=model[0], model_version=model[1]), pb.ModelInferResponse()
    for name, datatype, shape, region, size in outputs:
        output = described.outputs.add(name=name, datatype=datatype, shape=shape)
        if region:
            output.parameters["shared_memory_region"].string_param = region
            output.parameters["shared_memory_byte_size"].int64_param = size
    return head.SerializeToString(), described.SerializeToString()
