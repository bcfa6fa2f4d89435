"""A load on a gRPC server: python -m benchmarks.serve_load ADDRESS MODEL [INPUT ...] [--in-flight N | --rate R]

Closed loop: so many requests are always under way. Open loop: they come at random at a rate, whether or not earlier
ones have been answered, and a latency counts from when its request was due. Requests are serialised before, and sent in
turn over one connection of each process, as a channel of gRPC does it, by benchmarks/http2.py.

A model that takes texts or images is sent the INPUTs, files or texts; any other one chance numbers.
"""

import argparse
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.http2 import Connection, framed
from bundle.log import configure
from bundle.tensor import NUMPY_TYPES, TensorSpec
from serve.client import Client, Tls
from serve.client.calls import infer_request

INFER = "/inference.GRPCInferenceService/ModelInfer"
WARM_UP = 0.1  # of the time, before it counts


@dataclass(frozen=True)
class Target:
    """Whom to ask for what."""

    address: str  # HOST:PORT, or unix:PATH
    requests: tuple[bytes, ...]  # sent in turn
    method: str = INFER
    ca: bytes | None = None  # PEM, of a server that speaks TLS under the name localhost


@dataclass(frozen=True)
class Load:
    """What came of a load."""

    latencies: np.ndarray  # float64 (answers,), seconds
    seconds: float  # that it took

    @property
    def p50(self) -> float:
        """Of the latencies, ms."""
        return float(np.median(self.latencies) * 1e3)

    @property
    def p99(self) -> float:
        """Of the latencies, ms."""
        return float(np.percentile(self.latencies, 99) * 1e3)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds


class Caller:
    """One connection for all calls of this process. What is not answered with OK ends the program."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._messages = [framed(request) for request in target.requests]
        self._turn = cycle(self._messages)
        self._connection = self._connected()

    def _connected(self) -> Connection:
        return Connection(self._target.address, self._target.method, self._target.ca)

    def close(self) -> None:
        """The connection."""
        self._connection.close()

    def closed(self, in_flight: int, seconds: float) -> Load:
        """So many calls are always under way."""
        if self._connection.worn:
            self._connection.close()
            self._connection = self._connected()
        self._closed(in_flight, WARM_UP * seconds)
        return self._closed(in_flight, seconds)

    def _closed(self, in_flight: int, seconds: float) -> Load:
        start = now = time.perf_counter()
        latencies = []
        for _ in range(in_flight):
            self._connection.begin(next(self._turn), now)
        while in_flight:
            ended = self._connection.ended()
            now = time.perf_counter()
            for began, _ in ended:
                latencies.append(now - began)
                if now < start + seconds:
                    self._connection.begin(next(self._turn), now)
                else:
                    in_flight -= 1
        return Load(np.array(latencies), now - start)

    def open(self, rate: float, seconds: float) -> Load:
        """A Poisson process of calls, the same one each time."""
        start = now = time.perf_counter()
        gaps = np.random.default_rng(0).exponential(1 / rate, max(1, round(rate * seconds)))
        due = deque((start + np.cumsum(gaps)).tolist())
        latencies: list[float] = []
        while len(latencies) < len(gaps):
            while due and due[0] <= now:
                self._connection.begin(next(self._turn), due.popleft())
            ended = self._connection.ended(max(0.0, due[0] - now) if due else None)
            now = time.perf_counter()
            latencies.extend(now - moment for moment, _ in ended)
        return Load(np.array(latencies), now - start)

    def answers(self, in_flight: int) -> list[bytes]:
        """To each of the requests once."""
        answers = [b""] * len(self._messages)
        left = deque(enumerate(self._messages))
        under_way = 0
        while left or under_way:
            while left and under_way < in_flight:
                number, request = left.popleft()
                self._connection.begin(request, number)
                under_way += 1
            for number, answer in self._connection.ended():
                answers[number] = answer
                under_way -= 1
        return answers


class GrpcCaller:
    """grpcio's own client, as people have it: one blocking call after the other."""

    def __init__(self, target: Target) -> None:
        import grpc

        self._turn = cycle(target.requests)
        channel = (
            grpc.secure_channel(
                target.address.replace("127.0.0.1", "localhost"), grpc.ssl_channel_credentials(target.ca)
            )
            if target.ca
            else grpc.insecure_channel(target.address)
        )
        self._call = channel.unary_unary(target.method)

    def closed(self, in_flight: int, seconds: float) -> Load:
        """One call is always under way."""
        assert in_flight == 1
        self._closed(WARM_UP * seconds)
        return self._closed(seconds)

    def _closed(self, seconds: float) -> Load:
        start = now = time.perf_counter()
        latencies = []
        while now < start + seconds:
            began = time.perf_counter()
            self._call(next(self._turn))
            now = time.perf_counter()
            latencies.append(now - began)
        return Load(np.array(latencies), now - start)


@contextmanager
def worker(make: Callable[..., Any], *arguments: Any) -> Iterator[Pipe]:
    """A process of its own with what `make` makes there: send it a method's name and arguments, receive what it gives.

    Args:
        make: importable.
        arguments: of `make`.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, make, arguments), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(10)
        process.kill()


def _work(pipe: Pipe, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    configure(wanted=lambda level: level == "error")
    made = make(*arguments)
    while True:
        try:
            method, *given = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(made, method)(*given))


def ask(pipe: Pipe, method: str, *arguments: Any) -> Any:
    """What a worker's method gives."""
    pipe.send((method, *arguments))
    return pipe.recv()


class Callers:
    """A load from several processes; make it with `calling`."""

    def __init__(self, pipes: Sequence[Pipe]) -> None:
        self._pipes = pipes

    def closed(self, in_flight: int, seconds: float) -> Load:
        """So many calls are always under way, from as many processes as there are, but no more than calls."""
        pipes = self._pipes[:in_flight]
        shares = [in_flight // len(pipes) + (i < in_flight % len(pipes)) for i in range(len(pipes))]
        return _together(pipes, [("closed", share, seconds) for share in shares])

    def open(self, rate: float, seconds: float) -> Load:
        """Calls come at random at this rate a second."""
        return _together(self._pipes, [("open", rate / len(self._pipes), seconds)] * len(self._pipes))

    def answers(self, in_flight: int) -> list[bytes]:
        """To each of the requests once."""
        answers: list[bytes] = ask(self._pipes[0], "answers", in_flight)
        return answers


def _together(pipes: Sequence[Pipe], jobs: Sequence[tuple[Any, ...]]) -> Load:
    for pipe, job in zip(pipes, jobs, strict=True):
        pipe.send(job)
    loads = [pipe.recv() for pipe in pipes]
    return Load(np.concatenate([load.latencies for load in loads]), max(load.seconds for load in loads))


@contextmanager
def calling(target: Target, processes: int = 1, by: type[Caller] | type[GrpcCaller] = Caller) -> Iterator[Callers]:
    """Processes that are connected to a server."""
    with ExitStack() as stack:
        yield Callers([stack.enter_context(worker(by, target)) for _ in range(processes)])


def requests_for(address: str, model: str, inputs: Sequence[str], tls: Tls | None) -> Iterator[bytes]:
    """One request for each input, or for a model of numbers a few of them."""
    with Client(address, tls=tls) as client:
        takes = client.metadata(model).inputs
    chance = np.random.default_rng(0)
    raws = [Path(each).read_bytes() if Path(each).is_file() else each.encode() for each in inputs]
    if not raws and any(spec.datatype == "BYTES" for spec in takes):
        raise SystemExit(f"{model} takes texts or images: give at least one INPUT.")
    for raw in raws or [b""] * 8:
        yield infer_request(model, {spec.name: _value(spec, raw, chance) for spec in takes}, "", ()).SerializeToString()


def _value(spec: TensorSpec, raw: bytes, chance: np.random.Generator) -> np.ndarray:
    shape = [max(1, size) for size in spec.shape]
    if spec.datatype == "BYTES":
        return np.full(shape, raw, object)
    dtype = NUMPY_TYPES[spec.datatype]
    return (chance.random(shape) if dtype.kind == "f" else chance.integers(0, 2, shape)).astype(dtype)


def main() -> None:
    """Load a server and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT, or unix:PATH")
    parser.add_argument("model")
    parser.add_argument("inputs", nargs="*", metavar="INPUT")
    parser.add_argument("--in-flight", type=int, default=1, help="calls that are under way (default 1)")
    parser.add_argument("--rate", type=float, help="calls a second, open loop")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--ca", type=Path, help="PEM: speak TLS to a server of this authority")
    options = parser.parse_args()
    tls = Tls(ca=options.ca) if options.ca else None
    requests = tuple(requests_for(options.address, options.model, options.inputs, tls))
    target = Target(options.address, requests, ca=options.ca and options.ca.read_bytes())
    with calling(target, options.processes) as callers:
        if options.rate:
            load = callers.open(options.rate, options.seconds)
        else:
            load = callers.closed(options.in_flight, options.seconds)
    figures = {"answers": len(load.latencies), "answers_s": load.rate, "p50_ms": load.p50, "p99_ms": load.p99}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
