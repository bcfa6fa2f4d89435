"""The tritonserver of the wheel nvidia-pytriton, started directly: its Python backend, one instance, no batching.

With a number as last argument so many instances, of one thread each.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytriton

model, port, threads, *more = sys.argv[1:]
instances = int(more[0]) if more else 1
home = Path(pytriton.__file__).parent / "tritonserver"
shutil.copytree(home / "backends", "backends")  # and the stub of this Python, as pytriton puts it together
version = "{}.{}".format(*sys.version_info)
shutil.copy(home / "python_backend_stubs" / version / "triton_python_backend_stub", "backends/python")
folder = Path("repository") / Path(model).stem
(folder / "1").mkdir(parents=True)
here = Path(__file__).parent
shutil.copy(here / "serve_triton_model.py", folder / "1" / "model.py")
shutil.copy(here / "serve_shared.py", folder / "1")


def tensor(name: str, rank: int) -> str:
    return f'{{ name: "{name}" data_type: TYPE_FP32 dims: [ {", ".join(["-1"] * rank)} ] }}'


tensors = json.loads(os.environ["MODEL_TENSORS"])
(folder / "config.pbtxt").write_text(
    f"""backend: "python"
max_batch_size: 0
input [ {tensor(*tensors["input"])} ]
output [ {tensor(*tensors["output"])} ]
instance_group [ {{ count: {instances} kind: KIND_CPU }} ]
"""
)
options = {
    "model-repository": folder.parent.resolve(),
    "backend-directory": Path("backends").resolve(),
    "grpc-address": "127.0.0.1",
    "grpc-port": port,
    "allow-http": "false",
    "allow-metrics": "false",
    "log-info": "false",
}
environment = os.environ | {
    "MODEL": model,
    "MODEL_THREADS": "1" if instances > 1 else threads,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # where the stub looks for its environment
    "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib:{home.parent.parent}/nvidia_pytriton.libs",
}
server = str(home / "bin" / "tritonserver")
os.execve(
    server,
    [server, "--disable-auto-complete-config", *(f"--{key}={value}" for key, value in options.items())],
    environment,
)
