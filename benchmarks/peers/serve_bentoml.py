"""BentoML by gRPC, which its older interface alone has: one worker with the session, no runner, no access log."""

import os
import sys
from pathlib import Path


def service() -> object:
    import numpy as np
    from bentoml.io import NumpyNdarray
    from bentoml.legacy import Service
    from serve_shared import Model

    model = Model(os.environ["MODEL"], int(os.environ["MODEL_THREADS"]))
    made = Service(Path(os.environ["MODEL"]).stem)
    tensor = NumpyNdarray(dtype="float32", shape=model.row, enforce_shape=False)

    @made.api(input=tensor, output=NumpyNdarray(dtype="float32"))
    def predict(x: np.ndarray) -> np.ndarray:
        return model(x)

    return made


if __name__ == "__main__":
    model, port, threads = sys.argv[1:]
    os.environ |= {"MODEL": model, "MODEL_THREADS": threads, "BENTOML_HOME": str(Path.cwd())}
    os.environ["BENTOML_CONFIG_OPTIONS"] = "api_server.logging.access.enabled=false"
    folder = str(Path(__file__).parent)
    options = ["--production", "--host", "127.0.0.1", "--port", port, "--api-workers", "1", "--working-dir", folder]
    command = [sys.executable, "-m", "bentoml", "serve-grpc", f"{Path(__file__).stem}:served", *options]
    os.execv(sys.executable, command)

served = service()
