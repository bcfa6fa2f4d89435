"""Thirty lines of grpcio, with a pool of eight threads: what one writes first."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from serve_shared import Model, task

from protos import inference_pb2 as pb

wanted = task()
model = Model(wanted.model, wanted.threads)


def infer(message: pb.ModelInferRequest, context: grpc.ServicerContext) -> pb.ModelInferResponse:
    x = np.frombuffer(message.raw_input_contents[0], np.float32).reshape(tuple(message.inputs[0].shape))
    y = model(x)
    response = pb.ModelInferResponse(model_name=message.model_name, model_version="1", id=message.id)
    response.outputs.add(name="y", datatype="FP32", shape=y.shape)
    response.raw_output_contents.append(y.tobytes())
    return response


method = grpc.unary_unary_rpc_method_handler(
    infer, pb.ModelInferRequest.FromString, pb.ModelInferResponse.SerializeToString
)
server = grpc.server(ThreadPoolExecutor(8))
server.add_generic_rpc_handlers(
    [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})]
)
server.add_insecure_port(f"127.0.0.1:{wanted.port}")
server.start()
server.wait_for_termination()
