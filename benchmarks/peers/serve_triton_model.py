"""The model.py of Triton's Python backend: see serve_triton.py."""

import os
from typing import Any

import triton_python_backend_utils as pb_utils
from serve_shared import Model


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.model = Model(os.environ["MODEL"], int(os.environ["MODEL_THREADS"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:
        y = self.model(pb_utils.get_input_tensor_by_name(request, self.model.given.name).as_numpy())
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.model.answer.name, y)])
