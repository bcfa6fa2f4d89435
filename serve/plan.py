"""What the envelope of a request means to one version of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from serve.envelope import KEPT, Envelope
from serve.inputs import Input, describe_inputs
from serve.models import ServedModel
from serve.outputs import Wanted, read_outputs


@dataclass(frozen=True, slots=True)
class Plan:
    """All that can be read of a request before its tensors. Nothing that may change between two calls belongs here.

    Attributes:
        inputs: in the order of the request.
        wanted: outputs, in that of the answer.
        rows: 1 where no axis is known to be the batch.
    """

    inputs: tuple[Input, ...]
    wanted: tuple[Wanted, ...]
    rows: int


def planner(model: ServedModel) -> Callable[[Envelope], Plan]:
    """The plans of a model, each made once for all requests with the same envelope; what is refused is refused anew.

    The function that is returned raises BadInput when the request does not fit the model.
    """
    plan = partial(_plan, model)
    kept = lru_cache(KEPT)(plan)
    return lambda envelope: (kept if envelope.kept else plan)(envelope)


def _plan(model: ServedModel, envelope: Envelope) -> Plan:
    inputs = describe_inputs(envelope.message, model.inputs, model.optional)
    wanted = read_outputs(envelope.message, model.outputs)
    return Plan(inputs, wanted, model.rows({each.name: each.shape for each in inputs}))
