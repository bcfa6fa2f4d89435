"""A server of the protocol that fails when a test wants it to: it echoes tensors, and runs no model."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc


class Echo(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """What a test may change: which calls are refused and as what, what is answered, and whether answers wait."""

    def __init__(self):
        self.refusals = 0  # of the next calls
        self.status = grpc.StatusCode.UNAVAILABLE
        self.refuses = lambda request: False
        self.answer = None
        self.together = threading.Barrier(1)  # inference calls that are answered at the same time
        self.input = "text"
        self.health = health.HealthServicer()
        self.calls = Counter()
        self.requests = []
        self.left_s = []  # of each call's deadline
        self.headers = {}
        self.inferring = threading.Event()  # a call came so far
        self.ended = threading.Event()  # a call of inference, however

    def enter(self, method, context):
        self.calls[method] += 1
        self.headers = dict(context.invocation_metadata())
        self.left_s.append(context.time_remaining())
        if method in ("ModelInfer", "ModelStreamInfer"):
            context.add_callback(self.ended.set)
        if self.refusals > 0:
            self.refusals -= 1
            context.abort(self.status, "Exceeds maximum queue size")

    def ServerReady(self, request, context):
        self.enter("ServerReady", context)
        return pb.ServerReadyResponse(ready=True)

    def ModelMetadata(self, request, context):
        self.enter("ModelMetadata", context)
        answer = pb.ModelMetadataResponse(name=request.name, versions=["1"], platform="edgeward_bundle")
        answer.inputs.add(name=self.input, datatype="BYTES", shape=[-1, 1])
        return answer

    def ModelInfer(self, request, context):
        self.requests.append(request)
        self.enter("ModelInfer", context)
        if self.refuses(request):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "example 0 is bad")
        self.inferring.set()
        self.together.wait(10)
        return self.answer or echo(request)

    def ModelStreamInfer(self, requests, context):
        self.enter("ModelStreamInfer", context)
        for request in requests:
            self.requests.append(request)
            if self.refuses(request):
                yield pb.ModelStreamInferResponse(error_message="example 0 is bad")
            else:
                yield pb.ModelStreamInferResponse(infer_response=echo(request))

    def RepositoryModelLoad(self, request, context):
        self.enter("RepositoryModelLoad", context)
        return pb.RepositoryModelLoadResponse()


def echo(request):
    answer = pb.ModelInferResponse(model_name=request.model_name, raw_output_contents=request.raw_input_contents)
    for tensor in request.inputs:
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return answer


@contextmanager
def serving(address="127.0.0.1:0", credentials=None):
    """An Echo and its health, with the `address` that it really listens on."""
    servicer = Echo()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer.health, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    servicer.stop = lambda: server.stop(0).wait()
    servicer.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
    try:
        yield servicer
    finally:
        servicer.together.abort()
        servicer.stop()
