"""One ModelInfer on its way: read, queued, run, answered."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from bundle.errors import EdgewardError
from serve.envelope import Request
from serve.inputs import read_inputs
from serve.loading import Served
from serve.logs import Ended
from serve.outputs import Wanted, find_parts, write_answer
from serve.queue import Job, Outcome
from serve.shared_memory import Part, Regions
from serve.statistics import Reason

StepAside = Callable[[bool], bool]


class Inference:
    """One call, from its request to its response; used by one thread, but for `done`.

    Attributes:
        served: the model that takes it, once it is queued.
        job: what was queued.
        trace: for the caller.
    """

    def __init__(
        self,
        request: Request,
        regions: Regions,
        done: Callable[[Outcome], None],
        deadline: float | None,
        step_aside: StepAside | None,
    ) -> None:
        """Read what does not depend on the model.

        Args:
            request: as it came.
            regions: of shared memory.
            done: called once, from any thread, with what `answer` takes.
            deadline: time.monotonic() when nobody waits for the answer any more.
            step_aside: asked with whether a run is likely to be short, lets the caller's thread run it, which holds
                nobody up once this has returned True. None: another thread runs it in any case.

        Raises:
            BadInput, NotSupported: the request's parameters.
        """
        self._request, self._regions, self._done, self._deadline = request, regions, done, deadline
        self._options, self._step_aside = request.envelope.options, step_aside
        self._wanted: Sequence[Wanted] = ()
        self._parts: Mapping[str, Part] = {}
        self.served: Served | None = None
        self.job: Job | None = None
        self.trace: Any = None

    def queue(self, served: Served) -> None:
        """Check the request against a model, and let it wait for its run, or run it.

        Raises:
            BadInput: the request does not fit the model.
            NotReady: too much waits already, or the model is being unloaded.
        """
        start = time.perf_counter_ns()
        try:
            plan = served.plan(self._request.envelope)
            arrays = read_inputs(plan.inputs, self._request.raws, self._regions)
            self._wanted, self._parts = plan.wanted, find_parts(plan.wanted, self._regions)
        except Exception as error:
            served.statistics.failed(_reason(error), time.perf_counter_ns() - start)
            raise
        self.served = served
        self.job = Job(
            arrays=arrays,
            rows=plan.rows,
            key=served.model.key(arrays),
            done=self._done,
            level=self._options.priority,
            timeout_s=self._options.timeout_s,
            deadline=self._deadline,
            size=self._request.size,
        )
        if not (self._step_aside and served.scheduler.try_inline(self.job, self._step_aside)):
            self.job.times.started = 0  # it was not run here
            served.scheduler.submit(self.job)

    def answer(self, outcome: Outcome) -> bytes:
        """What `done` was given, as a ModelInferResponse.

        Raises:
            EdgewardError: it was an error, or the answer does not fit where it is to be written.
        """
        if isinstance(outcome, Exception):
            raise outcome
        assert self.served is not None
        model = self.served.model
        try:
            return write_answer(
                (model.name, str(model.version)),
                self._request.id,
                self._wanted,
                self._parts,
                outcome,
                model.labels,
                batched=model.max_batch > 0,
            )
        except Exception as error:
            assert self.job is not None
            times = self.job.times
            self.served.statistics.unwritten(_reason(error), times.ended - times.queued)
            raise

    def cancel(self) -> None:
        """Nobody waits any more: drop it, unless it runs already."""
        if self.served is not None and self.job is not None:
            self.served.scheduler.cancel(self.job)

    def ended(self, code: grpc.StatusCode) -> Ended:
        """What logs and traces say of it; of the model what was asked for, until it is queued."""
        envelope, served, job = self._request.envelope, self.served, self.job
        version = str(served.model.version) if served else envelope.model_version
        rows, times = (job.rows, job.times) if job else (0, None)
        return Ended(envelope.model_name, version, self._request.id, rows, code, times)


def _reason(error: Exception) -> Reason:
    """Why a request cannot be read, or its answer not be written: it asks for what cannot be, or the fault is here."""
    return "bad_input" if isinstance(error, EdgewardError) else "error"
