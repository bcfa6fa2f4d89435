"""MLServer, its custom runtime, in the server's own process: parallel_workers 0, debug off, metrics on."""

import asyncio
from pathlib import Path

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse
from serve_shared import Model, free_port, task


class Onnx(MLModel):
    async def load(self) -> bool:
        self.model = Model(self.settings.parameters.uri, self.settings.parameters.extra["threads"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        y = self.model(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])


async def main() -> None:
    wanted = task()
    ports = {"grpc_port": wanted.port, "http_port": free_port(), "metrics_port": free_port()}
    folder = str(Path.cwd())
    settings = Settings(
        host="127.0.0.1", debug=False, parallel_workers=0, environments_dir=folder, metrics_dir=folder, **ports
    )
    parameters = ModelParameters(uri=wanted.model, extra={"threads": wanted.threads})
    await MLServer(settings).start([ModelSettings(name=wanted.name, implementation=Onnx, parameters=parameters)])


asyncio.run(main())
