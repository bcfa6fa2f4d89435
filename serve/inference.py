"""One ModelInfer on its way: read, queued, run, answered."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bundle.errors import BadInput
from protos import inference_pb2 as pb
from serve.envelope import Raws
from serve.inputs import read_inputs
from serve.outputs import Wanted, read_outputs, write_outputs
from serve.parameters import read_request
from serve.queue import Job
from serve.repository import Served
from serve.shared_memory import Regions

Outcome = Mapping[str, np.ndarray] | Exception
StepAside = Callable[[], bool]


class Inference:
    """One call, from its request to its response; used by one thread, but for `done`.

    Attributes:
        served: the model that takes it, once it is queued.
        job: what was queued.
        trace: for the caller.
    """

    def __init__(
        self,
        request: pb.ModelInferRequest,
        regions: Regions,
        done: Callable[[Outcome], None],
        deadline: float | None,
        *,
        raws: Raws | None = None,
        size: int = 0,
        step_aside: StepAside | None = None,
    ) -> None:
        """Read what does not depend on the model.

        Args:
            request: as it came.
            regions: of shared memory.
            done: called once, from any thread, with what `answer` takes.
            deadline: time.monotonic() when nobody waits for the answer any more.
            raws: its raw_input_contents, where they were taken out of it.
            size: bytes of the request; 0: nobody knows.
            step_aside: lets the caller's thread run a model, which takes no time from others once this has returned
                True. It is not asked when the run is likely to be short. None: another thread runs it in any case.

        Raises:
            BadInput, NotSupported: the request's parameters.
        """
        self._request, self._regions, self._done, self._deadline = request, regions, done, deadline
        self._raws, self._size, self._step_aside = raws, size, step_aside
        self._options = read_request(request.parameters)
        self._wanted: list[Wanted] = []
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
        model = served.model
        try:
            arrays = read_inputs(self._request, model.inputs, model.optional, self._regions, self._raws)
            self._wanted = read_outputs(self._request, model.outputs, self._regions)
            rows = model.rows(arrays)
        except BadInput:
            served.statistics.failed("bad_input", time.perf_counter_ns() - start)
            raise
        self.served = served
        self.job = Job(
            arrays=arrays,
            rows=rows,
            key=model.key(arrays),
            done=self._done,
            level=self._options.priority,
            timeout_s=self._options.timeout_s,
            deadline=self._deadline,
            size=self._size,
        )
        if not (self._step_aside and served.scheduler.try_inline(self.job, self._step_aside)):
            served.scheduler.submit(self.job)

    def answer(self, outcome: Outcome) -> pb.ModelInferResponse:
        """What `done` was given, as the response.

        Raises:
            EdgewardError: it was an error, or the answer does not fit where it is to be written.
        """
        if isinstance(outcome, Exception):
            raise outcome
        assert self.served is not None
        model = self.served.model
        response = pb.ModelInferResponse(model_name=model.name, model_version=str(model.version), id=self._request.id)
        write_outputs(response, self._wanted, outcome, model.labels, batched=model.max_batch > 0)
        return response

    def cancel(self) -> None:
        """Nobody waits any more: drop it, unless it runs already."""
        if self.served is not None and self.job is not None:
            self.served.scheduler.cancel(self.job)

    def facts(self) -> dict[str, Any]:
        """What logs and traces say of it; of the model what was asked for, until it is queued."""
        request, served, job = self._request, self.served, self.job
        return {
            "model": request.model_name,
            "version": served.model.version if served else request.model_version,
            "id": request.id,
            "rows": job.rows if job else 0,
            "times": job.times if job else None,
        }
