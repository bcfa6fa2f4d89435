"""A server of the protocol that fails when a test wants it to: it echoes tensors, and runs no model."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc


class Echo(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """What a test may change: how many calls are refused, as what, what is answered, and whether answers wait."""

    def __init__(self):
        self.refusals = 0
        self.status = grpc.StatusCode.UNAVAILABLE
        self.answer = None
        self.calls = Counter()
        self.requests = []
        self.headers = {}
        self.together = threading.Barrier(1)
        self.finished = threading.Event()

    def enter(self, method, context):
        self.calls[method] += 1
        self.headers = dict(context.invocation_metadata())
        context.add_callback(self.finished.set)
        if self.refusals > 0:
            self.refusals -= 1
            context.abort(self.status, "Exceeds maximum queue size")

    def ServerReady(self, request, context):
        self.enter("ServerReady", context)
        return pb.ServerReadyResponse(ready=True)

    def ModelMetadata(self, request, context):
        self.enter("ModelMetadata", context)
        answer = pb.ModelMetadataResponse(name=request.name, versions=["1"], platform="edgeward_bundle")
        answer.inputs.add(name="text", datatype="BYTES", shape=[-1, 1])
        return answer

    def ModelInfer(self, request, context):
        self.requests.append(request)
        self.enter("ModelInfer", context)
        self.together.wait(10)
        return self.answer or echo(request)

    def ModelStreamInfer(self, requests, context):
        self.enter("ModelStreamInfer", context)
        for request in requests:
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
    """An Echo, and the address that it really listens on; `server` stops it earlier."""
    servicer = Echo()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    servicer.server = server
    servicer.address = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    try:
        yield servicer
    finally:
        servicer.together.abort()
        server.stop(0).wait()
