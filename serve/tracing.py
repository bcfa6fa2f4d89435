"""One span for every call, with its stages as children, sent to the OpenTelemetry collector that the user named.

Import it only when a collector was named: without the extra `tracing` the import is an error. The SDK's own environment
variables hold (sampling, batches, headers, certificates, resource attributes). A caller's `traceparent` is the parent,
and where the caller does not sample, neither does this.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from urllib.parse import urlsplit

import grpc

from bundle.errors import MissingExtra
from serve.errors import StartError
from serve.logs import MAX_TEXT, Ended

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise MissingExtra(
        "opentelemetry is not installed, and traces need it. Install edgeward with its extra 'tracing'."
    ) from error

LAST_SPANS_S = 2.0  # that a collector has for them when the server stops

_SERVICE = "inference.GRPCInferenceService"
_METHOD = "ModelInfer"  # of the requests of a stream, too: each is a call of its own here
_HEADERS = ("traceparent", "tracestate")
_OURS = {  # codes that are a server's fault, by OpenTelemetry's conventions for RPC
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


@dataclass(frozen=True)
class Begun:
    """A call whose end has not come.

    Attributes:
        parent: what the caller sent.
        start_ns: in time.perf_counter_ns().
        epoch_ns: of time.perf_counter_ns(), since 1970.
    """

    parent: Context
    start_ns: int
    epoch_ns: int


class Tracer:
    """Makes the spans of calls. A span is made when its call has ended; until then a call costs two clocks."""

    def __init__(self, processor: SpanProcessor) -> None:
        """Trace into a processor of the SDK."""
        resource = Resource.create({"service.name": "edgeward", "service.version": version("edgeward")})
        self._provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("edgeward", version("edgeward"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, metadata: Iterable[tuple[str, str | bytes]]) -> Begun:
        """A call came.

        Args:
            metadata: of the call, as grpc gives it.
        """
        headers = {key: value for key, value in metadata if key in _HEADERS and isinstance(value, str)}
        start_ns = time.perf_counter_ns()
        return Begun(self._propagator.extract(headers), start_ns, time.time_ns() - start_ns)

    def end(self, begun: Begun, ended: Ended) -> None:
        """A call was answered; `begun` is what `begin` gave."""
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": _SERVICE,
            "rpc.method": _METHOD,
            "rpc.grpc.status_code": ended.code.value[0],
            "edgeward.model": ended.model[:MAX_TEXT],
            "edgeward.version": ended.version,
            "edgeward.id": ended.id[:MAX_TEXT],
            "edgeward.rows": ended.rows,
        }
        span = self._tracer.start_span(
            f"{_SERVICE}/{_METHOD}",
            begun.parent,
            trace.SpanKind.SERVER,
            attributes,
            start_time=begun.epoch_ns + begun.start_ns,
        )
        if span.is_recording():
            self._stages(span, begun.epoch_ns, ended)
            if ended.code in _OURS:
                span.set_status(trace.StatusCode.ERROR)
        span.end(begun.epoch_ns + time.perf_counter_ns())

    def _stages(self, span: trace.Span, epoch_ns: int, ended: Ended) -> None:
        within = trace.set_span_in_context(span, Context())
        for name, (start, end) in ended.stages().items():
            self._tracer.start_span(name, within, start_time=epoch_ns + start).end(epoch_ns + end)

    def close(self) -> None:
        """Send the last spans."""
        self._provider.shutdown()


class OtlpTracer(Tracer):
    """A tracer that sends its spans to a collector, in batches, from a thread of its own."""

    def __init__(self, endpoint: str) -> None:
        """Nothing is sent before there are spans; what cannot be sent is logged and dropped.

        Args:
            endpoint: http://HOST:PORT or, with TLS, https://HOST:PORT.

        Raises:
            StartError: the endpoint is none.
        """
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StartError(f"--otlp {endpoint!r} is no collector; expected http://HOST:PORT or https://HOST:PORT.")
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        super().__init__(BatchSpanProcessor(self._exporter))

    def close(self) -> None:
        """Send the last spans, and give up soon where nobody takes them."""
        giving_up = threading.Timer(LAST_SPANS_S, self._exporter.shutdown)
        giving_up.start()
        super().close()
        giving_up.cancel()
