import importlib
import os
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from bundle.errors import MissingExtra
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from serve import tracing
from serve.config import ServeConfig
from serve.envelope import parse_request
from serve.errors import StartError
from serve.logs import Ended
from serve.queue import Times
from serve.repository import open_repository
from serve.server import start
from serve.service import Service
from serve.shared_memory import Regions
from serve.tracing import OtlpTracer, Tracer
from tests.serve_bundles import identity

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = [("user-agent", "x"), ("traceparent", f"00-{TRACE}-{PARENT}-01"), ("some-bin", b"\0")]
UNSAMPLED = [("traceparent", f"00-{TRACE}-{PARENT}-00")]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def spans():
    return InMemorySpanExporter()


def trace(tracer, metadata=(), *, ran=True, code=grpc.StatusCode.OK, id="7"):
    """One call from its begin to its end."""
    begun = tracer.begin(metadata)
    start = begun.start_ns
    times = Times(start + 10, start + 30, start + 60, start + 100, start + 150) if ran else Times(start, 0, 0, 0, start)
    tracer.end(begun, Ended("mood", "3", id, 2, code, times))


def traced(spans, metadata=(), **call):
    tracer = Tracer(SimpleSpanProcessor(spans))
    trace(tracer, metadata, **call)
    tracer.close()
    return {span.name.rpartition("/")[2]: span for span in spans.get_finished_spans()}


def test_a_call_is_a_span_of_its_caller(spans):
    """The span belongs to the trace that the caller's traceparent names, and says what was asked for."""
    span = traced(spans, SAMPLED)["ModelInfer"]

    assert span.name == "inference.GRPCInferenceService/ModelInfer"
    assert span.kind is SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert dict(span.attributes) == {
        "rpc.system": "grpc", "rpc.service": "inference.GRPCInferenceService", "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0, "edgeward.model": "mood", "edgeward.version": "3", "edgeward.id": "7",
        "edgeward.rows": 2,
    }  # fmt: skip
    assert span.resource.attributes["service.name"] == "edgeward"


def test_the_stages_are_its_children(spans):
    """Queue, decode, run and encode follow each other within the call, as long as they took."""
    found = traced(spans, SAMPLED)
    call = found.pop("ModelInfer")

    assert list(found) == ["queue", "decode", "run", "encode"]
    assert [span.end_time - span.start_time for span in found.values()] == [20, 30, 40, 50]
    assert {span.parent.span_id for span in found.values()} == {call.context.span_id}
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    assert found["queue"].start_time - call.start_time == 10
    assert found["queue"].end_time == found["decode"].start_time


@pytest.mark.parametrize("metadata", [[], [("traceparent", "00-xyz-1-01")], [("traceparent", "00-" + "1" * 9000)]])
def test_without_a_caller_that_traces_a_trace_begins_here(metadata, spans):
    """No traceparent, and one that is none, make the call the root of a trace of its own."""
    span = traced(spans, metadata)["ModelInfer"]

    assert span.parent is None
    assert f"{span.context.trace_id:032x}" != TRACE


def test_what_the_caller_does_not_sample_is_not_traced(spans):
    """The decision of the caller holds for the whole trace."""
    assert traced(spans, UNSAMPLED) == {}


def test_the_environment_decides_what_is_sampled(spans, monkeypatch):
    """OpenTelemetry's own variables hold, as they do for every other service."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert traced(spans, SAMPLED) == {}


def test_the_environment_names_the_service(spans, monkeypatch):
    """The service's name and resource can be set from outside."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "till-7")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "shop=berlin")

    attributes = traced(spans)["ModelInfer"].resource.attributes
    assert (attributes["service.name"], attributes["shop"]) == ("till-7", "berlin")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.UNAVAILABLE, StatusCode.ERROR),
        (grpc.StatusCode.INTERNAL, StatusCode.ERROR),
        (grpc.StatusCode.INVALID_ARGUMENT, StatusCode.UNSET),
        (grpc.StatusCode.CANCELLED, StatusCode.UNSET),
    ],
)
def test_a_failure_of_the_server_is_an_error_and_a_clients_is_not(code, status, spans):
    """The status follows OpenTelemetry's conventions; a call that did not run has no stages."""
    found = traced(spans, ran=False, code=code)

    assert list(found) == ["ModelInfer"]
    assert found["ModelInfer"].status.status_code is status
    assert found["ModelInfer"].attributes["rpc.grpc.status_code"] == code.value[0]


def test_a_long_id_is_cut(spans):
    """A client cannot make a span as large as a message."""
    assert traced(spans, id="x" * 10_000)["ModelInfer"].attributes["edgeward.id"] == "x" * 200


@pytest.mark.parametrize(("passed", "code"), [(False, grpc.StatusCode.OK), (True, grpc.StatusCode.DEADLINE_EXCEEDED)])
def test_a_deadline_that_passes_during_the_run_is_what_the_client_was_told(passed, code, spans, tmp_path):
    """gRPC has ended the call then, whatever the model answers."""
    (tmp_path / "same.onnx").write_bytes(identity(np.float32, [1]))
    config = ServeConfig((tmp_path / "same.onnx",), device="cpu")
    repository, outcomes = open_repository(config), queue.SimpleQueue()
    service = Service(config, repository, Regions(enabled=False), Tracer(SimpleSpanProcessor(spans)))
    request = pb.ModelInferRequest(model_name="same", raw_input_contents=[b"\0\0\0\0"])
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    asked = parse_request(request.SerializeToString()), (), outcomes.put, time.monotonic() + 3600
    inference = service.begin(*asked)
    assert inference.answer(outcomes.get(timeout=30))
    inference.job.deadline -= 3600 * passed
    service.end(inference, None)
    repository.close(0)

    calls = [span for span in spans.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert [call.attributes["rpc.grpc.status_code"] for call in calls] == [code.value[0]]


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OpenTelemetry collector, as far as traces go."""

    def __init__(self):
        self.spans, self.metadata = [], {}

    def Export(self, request, context):
        self.metadata.update(context.invocation_metadata())
        for resource in request.resource_spans:
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def receiver():
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield receiver
    server.stop(None).wait()


def test_a_collector_gets_the_spans(receiver, monkeypatch):
    """Spans arrive by OTLP at the endpoint that was named, the last ones when the server stops."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")
    tracer = OtlpTracer(receiver.endpoint)
    trace(tracer, SAMPLED)
    trace(tracer, UNSAMPLED)
    tracer.close()

    names = [span.name for span in receiver.spans]
    assert sorted(names) == ["decode", "encode", "inference.GRPCInferenceService/ModelInfer", "queue", "run"]
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}
    assert receiver.metadata["x-key"] == "secret"


def test_only_the_named_collector_gets_them(receiver, monkeypatch):
    """The environment chooses how, never whether or where to."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    tracer = OtlpTracer(receiver.endpoint)
    trace(tracer)
    tracer.close()

    assert len(receiver.spans) == 5


def test_a_collector_that_is_not_there_does_not_keep_the_server(monkeypatch, caplog):
    """Stopping gives up the last spans soon, and says so."""
    monkeypatch.setattr(tracing, "LAST_SPANS_S", 0.05)
    tracer = OtlpTracer("http://127.0.0.1:1")
    trace(tracer)
    tracer.close()

    assert "while exporting" in caplog.text


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "", "http://", "ftp://collector:4317", "collector"])
def test_what_is_no_endpoint_is_refused(endpoint):
    """The server does not start with traces that would go nowhere."""
    with pytest.raises(StartError, match=r"is no collector; expected http://HOST:PORT"):
        OtlpTracer(endpoint)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    """Traces that were asked for are never silently left out."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "serve.tracing")

    with pytest.raises(MissingExtra, match="its extra 'tracing'"):
        importlib.import_module("serve.tracing")


def test_a_running_server_traces_its_calls(receiver, tmp_path):
    """A call with a traceparent in its metadata ends in the collector, with the stages that it went through."""
    (tmp_path / "same.onnx").write_bytes(identity(np.float32, [1]))
    config = ServeConfig((tmp_path / "same.onnx",), port=0, device="cpu", otlp=receiver.endpoint)
    request = pb.ModelInferRequest(model_name="same", id="7", raw_input_contents=[b"\0\0\0\0"])
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    server = start(config)
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = rpc.GRPCInferenceServiceStub(channel)
            stub.ModelInfer(request, metadata=SAMPLED[1:2], timeout=30)
            request.model_name = "other"
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(request, metadata=SAMPLED[1:2], timeout=30)
    finally:
        server.stop()

    calls = [span for span in receiver.spans if span.kind == span.SPAN_KIND_SERVER]
    found = [{each.key: each.value for each in call.attributes} for call in calls]
    assert sorted(span.name for span in receiver.spans if span not in calls) == ["decode", "encode", "queue", "run"]
    assert [(each["edgeward.model"].string_value, each["rpc.grpc.status_code"].int_value) for each in found] == [
        ("same", grpc.StatusCode.OK.value[0]),
        ("other", grpc.StatusCode.NOT_FOUND.value[0]),
    ]
    assert {call.parent_span_id.hex() for call in calls} == {PARENT}
