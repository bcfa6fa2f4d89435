"""Processes that benchmarks/serve_speed.py compares: the server as people start it, and what it is held to."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from protos import inference_pb2 as pb
from serve import server as module
from serve.config import ServeConfig

START_S = 60.0  # until a server must be ready
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
EDGEWARD = str(Path(sys.executable).with_name("edgeward"))


@dataclass(frozen=True)
class Serving:
    """`edgeward serve` in a process of its own."""

    process: int
    address: str
    ready_s: float  # since its process was started
    loaded_s: float  # of these for loading the models and their self-tests


@contextmanager
def serving(*arguments: str | Path) -> Iterator[Serving]:
    """A server with these paths and options, on any port unless they say otherwise."""
    listens = [] if "--socket" in arguments else ["--port", "0"]
    command = [EDGEWARD, "serve", *map(str, arguments), *listens]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield _ready(process, began)
    finally:
        process.terminate()
        process.communicate(timeout=START_S)


def _ready(process: "subprocess.Popen[str]", began: float) -> Serving:
    assert process.stderr is not None
    loaded_s, lines = 0.0, []
    for line in process.stderr:
        lines.append(line)
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "loaded":
            loaded_s += event["seconds"]
        if event.get("event") == "ready":
            return Serving(process.pid, event["address"], time.perf_counter() - began, loaded_s)
    raise SystemExit("the server did not start:\n" + "".join(lines))


class Echo:
    """Our own transport with handlers that parse nothing and answer constants."""

    def __init__(self, model: Path, answers: Mapping[str, bytes], options: Mapping[str, Any]) -> None:
        """Listen.

        Args:
            model: any; the server needs one.
            answers: by the path of the method.
            options: of ServeConfig.
        """
        server = module.start(ServeConfig((model,), device="cpu", **{"port": 0, **options}))
        self._address = server.address
        for method, answer in answers.items():
            server._transport._answering.unary[method] = lambda call, data, answer=answer: call.finish(answer)

    def address(self) -> str:
        """That it listens on."""
        return self._address


class Naive:
    """What one writes first on grpcio's public asyncio server."""

    def __init__(self, model: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)
        self._port = 0
        listening = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(listening)), daemon=True).start()
        listening.wait(START_S)

    async def _serve(self, listening: threading.Event) -> None:
        server = grpc.aio.server()
        method = grpc.unary_unary_rpc_method_handler(
            self._infer, pb.ModelInferRequest.FromString, pb.ModelInferResponse.SerializeToString
        )
        service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})
        server.add_generic_rpc_handlers([service])
        self._port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        listening.set()
        await server.wait_for_termination()

    async def _infer(self, message: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        x = np.frombuffer(message.raw_input_contents[0], np.float32).reshape(tuple(message.inputs[0].shape))
        (y,) = self._session.run(None, {"x": x})
        response = pb.ModelInferResponse(model_name=message.model_name, model_version="1", id=message.id)
        response.outputs.add(name="y", datatype="FP32", shape=y.shape)
        response.raw_output_contents.append(y.tobytes())
        return response

    def address(self) -> str:
        """That it listens on."""
        return f"127.0.0.1:{self._port}"


@contextmanager
def competitor() -> Iterator[int]:
    """A process that is always busy; its number."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def cpu_s(process: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def resident_mb(process: int) -> float:
    """Resident memory of a process, 10^6 bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of localhost that signs itself, and its key."""
    files = folder / "localhost.pem", folder / "localhost.key"
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    said = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", files[0], "-keyout", files[1]]
    subprocess.run(["openssl", "req", "-x509", *made, *map(str, said)], check=True, capture_output=True)
    return files
