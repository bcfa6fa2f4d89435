"""Ray Serve by its gRPC proxy: one replica of one deployment, no dashboard, no access log."""

import threading

import numpy as np
import ray
from ray import serve
from ray.serve.config import gRPCOptions
from serve_shared import Model, free_port, task

from protos import inference_pb2 as pb

WANTED = task()
QUIET = {"enable_access_log": False, "log_level": "WARNING"}


@serve.deployment(num_replicas=1, max_ongoing_requests=64, logging_config=QUIET)
class Onnx:
    def __init__(self, model: str, threads: int) -> None:
        self.model = Model(model, threads)

    def ModelInfer(self, message: pb.ModelInferRequest) -> pb.ModelInferResponse:
        x = np.frombuffer(message.raw_input_contents[0], np.float32).reshape(tuple(message.inputs[0].shape))
        y = self.model(x)
        response = pb.ModelInferResponse(model_name=message.model_name, raw_output_contents=[y.tobytes()])
        response.outputs.add(name="y", datatype="FP32", shape=y.shape)
        return response


if __name__ == "__main__":
    ray.init("local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    functions = ["protos.inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"]
    serve.start(
        http_options={"host": "127.0.0.1", "port": free_port()},
        grpc_options=gRPCOptions(port=WANTED.port, grpc_servicer_functions=functions),
        logging_config=QUIET,
    )
    serve.run(Onnx.bind(WANTED.model, WANTED.threads), name="default", route_prefix="/")
    threading.Event().wait()
