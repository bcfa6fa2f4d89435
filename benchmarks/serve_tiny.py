"""What the server adds to a tiny model, 100 -> 100 -> 10: python -m benchmarks.serve_tiny

Servers in processes of their own: this one on both of its transports, thirty lines of grpcio with a pool of threads,
and echoes, which parse nothing and answer a constant of the same size. One process calls them, closed loop, requests
serialised before; it speaks by grpcio's completion queue, so that it is not what is measured. Rounds are interleaved:
each server in each round, medians over the rounds; ratios are of the same round. CPU is that of the server's process.
With --pin servers have one core and the caller another: where other work leaves no core idle, Linux puts who is woken
beside who wakes him, and then a throughput is that of both on one core.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
from grpc._cython import cygrpc

from protos import inference_pb2 as pb

METHOD = "/inference.GRPCInferenceService/ModelInfer"
KINDS = ("echo", "served", "asyncio echo", "asyncio served", "naive")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def write_model(path: Path) -> None:
    """Two layers with a relu between them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    chance = np.random.default_rng(0)
    sizes = {"w1": (100, 100), "b1": (100,), "w2": (100, 10), "b2": (10,)}
    weights = [numpy_helper.from_array(chance.normal(size=s).astype(np.float32), n) for n, s in sizes.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 100])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    graph = helper.make_graph(nodes, "tiny", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def request() -> bytes:
    """One row."""
    row = np.random.default_rng(1).normal(size=(1, 100)).astype(np.float32)
    message = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[row.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 100])
    return message.SerializeToString()


def answer() -> bytes:
    """Of the echoes: as long as a real one."""
    message = pb.ModelInferResponse(model_name="tiny", model_version="1", raw_output_contents=[bytes(40)])
    message.outputs.add(name="y", datatype="FP32", shape=[1, 10])
    return message.SerializeToString()


def serve(kind: str, model: Path) -> None:
    """Tell the port on stdout; serve until stdin is closed."""
    print(naive(model) if kind == "naive" else served(kind, model), flush=True)
    sys.stdin.read()
    os._exit(0)


def served(kind: str, model: Path) -> int:
    """Our own server, or its transport with a handler that answers a constant."""
    from serve import server as module
    from serve.config import ServeConfig

    config = ServeConfig(
        (model,), port=0, device="cpu", threads=1, transport="asyncio" if "asyncio" in kind else "auto"
    )
    server = module.start(config)
    constant = answer()
    if kind == "echo":
        server._transport._answering.unary[METHOD] = lambda call, data: call.finish(constant)
    if kind == "asyncio echo":

        async def echo(data: bytes, context: Any) -> bytes:
            return constant

        handlers = server._transport._calls._handlers
        handlers[METHOD] = grpc.unary_unary_rpc_method_handler(echo)
    return int(server.port)


def naive(model: Path) -> int:
    """What one writes first."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)

    def infer(message: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        x = np.frombuffer(message.raw_input_contents[0], np.float32).reshape(tuple(message.inputs[0].shape))
        (y,) = session.run(None, {"x": x})
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
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    threading.Thread(target=server.wait_for_termination, daemon=True).start()
    return int(port)


def call(address: str, in_flight: int, seconds: float) -> list[float]:
    """Seconds of every call, so many at the same time."""
    channel = cygrpc.Channel(address.encode(), [], None)
    data, times, end = request(), [], time.perf_counter() + seconds

    def begin() -> None:
        operations = (
            cygrpc.SendInitialMetadataOperation(None, 0),
            cygrpc.SendMessageOperation(data, 0),
            cygrpc.SendCloseFromClientOperation(0),
            cygrpc.ReceiveInitialMetadataOperation(0),
            cygrpc.ReceiveMessageOperation(0),
            cygrpc.ReceiveStatusOnClientOperation(0),
        )
        start = time.perf_counter()
        channel.integrated_call(0, METHOD.encode(), None, None, None, None, ((operations, start),))

    for _ in range(in_flight):
        begin()
    while in_flight:
        event = channel.next_call_event()
        now = time.perf_counter()
        times.append(now - event.tag)
        assert event.batch_operations[5].code() == 0, event.batch_operations[5].details()
        if now < end:
            begin()
        else:
            in_flight -= 1
    return times


def load(seconds: float) -> None:
    """Read lines of a server and a concurrency from stdin; answer p50 in ms and answers a second."""
    for line in sys.stdin:
        port, in_flight = line.split()
        call(f"127.0.0.1:{port}", int(in_flight), seconds / 10)
        start = time.perf_counter()
        times = call(f"127.0.0.1:{port}", int(in_flight), seconds)
        took = time.perf_counter() - start
        print(median(times) * 1e3, np.percentile(times, 99) * 1e3, len(times) / took, len(times), flush=True)


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of this program."""
    command = [sys.executable, "-m", "benchmarks.serve_tiny", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def port_of(process: subprocess.Popen[str]) -> str:
    """The first line that is a number; the log may come before."""
    assert process.stdout is not None
    return next(line.strip() for line in process.stdout if line.strip().isdigit())


def cpu_s(process: subprocess.Popen[str]) -> float:
    """That a process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def measure(
    rounds: int, seconds: float, kinds: list[str], pin: list[str]
) -> dict[tuple[str, int], list[tuple[float, ...]]]:
    """p50 and p99 in ms, answers a second, CPU microseconds an answer: by server and concurrency, one of each round."""
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = Path(folder) / "tiny.onnx"
        write_model(model)
        servers = {kind: stack.enter_context(child("--serve", kind, "--model", str(model), *pin)) for kind in kinds}
        ports = {kind: port_of(process) for kind, process in servers.items()}
        caller = stack.enter_context(child("--load", "--seconds", str(seconds), *pin))
        assert caller.stdin is not None
        assert caller.stdout is not None
        for _ in range(rounds):
            for in_flight in (1, 8):
                for kind in kinds:
                    before = cpu_s(servers[kind])
                    print(ports[kind], in_flight, file=caller.stdin, flush=True)
                    p50, p99, rate, count = map(float, caller.stdout.readline().split())
                    used = (cpu_s(servers[kind]) - before) / (count * 1.1) * 1e6
                    found[kind, in_flight].append((p50, p99, rate, used))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each server in each round and load (default 1)")
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--pin", action="store_true", help="servers to one core, the caller to another")
    options = parser.parse_args()
    if options.pin:
        os.sched_setaffinity(0, {1 if options.load else 0})
    if options.serve:
        serve(options.serve, options.model)
    elif options.load:
        load(options.seconds)
    else:
        pin = ["--pin"] if options.pin else []
        report(measure(options.rounds, options.seconds, options.only, pin), options.only)


def report(found: dict[tuple[str, int], list[tuple[float, ...]]], kinds: list[str]) -> None:
    """Medians, then ratios to what is to be compared with."""
    columns = ("c=1 p50 ms", "p99 ms", "CPU µs", "c=8 p50 ms", "p99 ms", "CPU µs", "answers/s")
    print(f"{'server':16}" + "".join(f"{column:>12}" for column in columns))
    for kind in kinds:
        one, eight = ([median(column) for column in zip(*found[kind, c], strict=True)] for c in (1, 8))
        cells = [f"{one[0]:.3f}", f"{one[1]:.3f}", f"{one[3]:.0f}", f"{eight[0]:.3f}", f"{eight[1]:.3f}"]
        print(f"{kind:16}" + "".join(f"{cell:>12}" for cell in [*cells, f"{eight[3]:.0f}", f"{eight[2]:.0f}"]))
    pairs = [("served", "echo"), ("served", "asyncio served"), ("served", "naive"), ("asyncio served", "asyncio echo")]
    for a, b in pairs:
        if a in kinds and b in kinds:
            latency = median(x[0] / y[0] for x, y in zip(found[a, 1], found[b, 1], strict=True))
            rate = median(x[2] / y[2] for x, y in zip(found[a, 8], found[b, 8], strict=True))
            print(f"{a} / {b}: p50 at c=1 {latency:.2f}, answers/s at c=8 {rate:.2f}")


if __name__ == "__main__":
    main()
