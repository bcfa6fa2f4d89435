"""The outputs that a request asks for, and the answer that holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bundle.errors import BadInput
from bundle.tensor import TensorSpec
from protos import inference_pb2 as pb
from serve import classification
from serve.parameters import read_output
from serve.shared_memory import Part, Regions
from serve.tensors import to_raw


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for.

    Attributes:
        spec: of the model's output.
        part: of shared memory, where its bytes go instead of the message.
        classes: how many of the highest values are to come as text; 0: the tensor itself.
    """

    spec: TensorSpec
    part: Part | None = None
    classes: int = 0


def read_outputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec], regions: Regions) -> list[Wanted]:
    """What a request asks for, in its order; all that the model gives where it names none.

    Args:
        request: as it came.
        specs: what the model gives.
        regions: shared memory that outputs may go to.

    Raises:
        BadInput: an output is unknown or named twice, or cannot come as it is asked for.
        EdgewardError: shared memory that an output is to go to is not there.
    """
    known = {spec.name: spec for spec in specs}
    wanted: dict[str, Wanted] = {}
    for output in request.outputs:
        if output.name not in known:
            raise BadInput(f"unexpected output {output.name!r}; the model gives {', '.join(map(repr, known))}.")
        if output.name in wanted:
            raise BadInput(f"output {output.name!r} already exists in request; expected once.")
        wanted[output.name] = _wanted(output, known[output.name], regions)
    return list(wanted.values()) or [Wanted(spec) for spec in specs]


def _wanted(output: pb.ModelInferRequest.InferRequestedOutputTensor, spec: TensorSpec, regions: Regions) -> Wanted:
    options = read_output(output.parameters, f"output {output.name!r}")
    if options.classes:
        classification.check(spec)
    place = options.place
    part = regions.part(place.region, place.offset, place.byte_size) if place else None
    return Wanted(spec, part, options.classes)


def write_outputs(
    response: pb.ModelInferResponse,
    wanted: Sequence[Wanted],
    arrays: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[str]],
    *,
    batched: bool,
) -> None:
    """Add what is wanted to a response, in that order, raw.

    An entry whose bytes went to shared memory is empty; the parameters of its output say where they are, and how many.

    Args:
        response: gains outputs and raw_output_contents.
        wanted: by read_outputs.
        arrays: by name, of the dtypes of their specs; elements of BYTES are bytes or str.
        labels: by output and class, for the classification extension.
        batched: whether the first axis of every output is the batch.

    Raises:
        BadInput: shared memory does not hold an output.
    """
    for each in wanted:
        name, datatype, array = each.spec.name, each.spec.datatype, arrays[each.spec.name]
        if each.classes:
            array = classification.top_classes(array, each.classes, labels.get(name, ()), batched=batched)
            datatype = "BYTES"
        output = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if each.part is None:
            response.raw_output_contents.append(to_raw(array, datatype))
        else:
            response.raw_output_contents.append(b"")
            size = each.part.write(to_raw(array, datatype) if datatype == "BYTES" else np.ascontiguousarray(array).data)
            output.parameters["shared_memory_region"].string_param = each.part.region.name
            output.parameters["shared_memory_byte_size"].int64_param = size
