"""LitServe by HTTP: one worker, fast_queue, one API server; the body is the tensor's bytes, and so is the answer."""

from typing import Annotated

import litserve
import numpy as np
from fastapi import Body, Response
from serve_shared import Model, task


class Onnx(litserve.LitAPI):
    def setup(self, device: str) -> None:
        wanted = task()
        self.model = Model(wanted.model, wanted.threads)

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> np.ndarray:
        return np.frombuffer(request, np.float32).reshape(self.model.row)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model(x)

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    server = litserve.LitServer(Onnx(), accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=task().port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
