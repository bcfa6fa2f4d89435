"""How fast the server is, beside its limits, each figure with its goal: python -m benchmarks.serve_speed [--keep]

Everything that is compared runs in one go, in turns, in processes of its own; a figure is the median over the rounds of
the ratios within each round. The server is `edgeward serve` as people start it: batching, admission, deadlines and
counts are on. An echo is its transport with a handler that parses nothing and answers a constant, sent the same bytes.
All servers, those of thirty lines too, have the setting of gRPC that ours takes. Who calls them all is the same light
client, benchmarks/http2.py: one connection, over which all calls under way go, from one process. What is said to be by
grpcio is asked by grpcio's own client instead, as people have it.

tiny      A network of 12,000 weights, on TCP, a Unix-domain socket and TLS: what a call costs.
added     ResNet18 with uint8 and float32, tweets to MiniLM, JPEG: what serving adds to the same work in process.
many      ResNet18 with uint8: 8 clients, without and with other work on the machine.
batching  MiniLM in static int8: 16 clients, joined and one by one.
idle, start, memory, install: see benchmarks/serve_footprint.py
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.serve_figures import Figure, Options, in_turns, keep, middle, ratio, table
from benchmarks.serve_footprint import idle, install, memory, start
from benchmarks.serve_load import INFER, WARM_UP, Callers, GrpcCaller, Load, Target, ask, calling, worker
from benchmarks.serve_models import InProcess, SideBySide, Work, model, work
from benchmarks.serve_sides import Echo, Naive, certificate, competitor, cpu_s, serving
from bundle.host import cpu_count, cpu_name

ECHO = "/echo/constant"

p50, p99, rate = attrgetter("p50"), attrgetter("p99"), attrgetter("rate")


def tiny(options: Options) -> Iterator[Figure]:
    """What a call costs, on every transport."""
    for transport in ("TCP", "unix", "TLS"):
        yield from _tiny(options, transport)


def _tiny(options: Options, transport: str) -> Iterator[Figure]:
    goal = "7" if transport == "TLS" else "1"
    with TemporaryDirectory() as folder, ExitStack() as stack:
        targets, process = _tiny_targets(stack, options, transport, Path(folder))
        callers = {name: stack.enter_context(calling(target)) for name, target in targets.items()}
        sides = {
            (name, count): partial(each.closed, count, options.seconds)
            for count in (1, 8)
            for name, each in callers.items()
        }
        for name in ("served", "echo"):
            by_grpcio = stack.enter_context(calling(targets[name], by=GrpcCaller))
            sides[f"{name} by grpcio", 1] = partial(by_grpcio.closed, 1, options.seconds)
        found = in_turns(sides, options.rounds)
        cpu_us = _cpu_us(process, callers["served"], options.seconds)
    ours = found["served", 1]
    said = f"{middle(ours, p50):.3f} and {middle(found['echo', 1], p50):.3f} ms; p99 {middle(ours, p99):.2f} ms"
    yield Figure(goal, f"tiny, {transport}, c=1: p50 / echo", ratio(ours, found["echo", 1], p50), "<=", 1.6, said)
    ours, echo = found["served by grpcio", 1], found["echo by grpcio", 1]
    said = f"{middle(ours, p50):.3f} and {middle(echo, p50):.3f} ms; p99 {middle(ours, p99):.2f} ms"
    yield Figure(goal, f"tiny, {transport}, c=1, by grpcio: p50 / echo", ratio(ours, echo, p50), "<=", 1.6, said)
    for name in callers:
        if name not in ("served", "echo"):
            one, eight = (ratio(found["served", c], found[name, c], of) for c, of in ((1, p50), (8, rate)))
            said = f"{middle(found[name, 1], p50):.3f} ms"
            yield Figure(goal, f"tiny, {transport}, c=1: p50 / {name}", one, "<=", 0.7, said)
            said = f"{middle(found['served', 8], rate):.0f} and {middle(found[name, 8], rate):.0f} answers/s"
            yield Figure(goal, f"tiny, {transport}, c=8: throughput / {name}", eight, ">=", 2.5, said)
    share = ratio(found["served", 8], found["echo", 8], rate)
    said = f"echo {middle(found['echo', 8], rate):.0f} answers/s"
    yield Figure(goal, f"tiny, {transport}, c=8: throughput / echo", share, said=said)
    yield Figure(goal, f"tiny, {transport}, c=8: CPU of the server for an answer, µs", cpu_us)


def _cpu_us(process: int, callers: Callers, seconds: float) -> float:
    before = cpu_s(process)
    load = callers.closed(8, seconds)
    return (cpu_s(process) - before) / (len(load.latencies) * (1 + WARM_UP)) * 1e6


def _tiny_targets(stack: ExitStack, options: Options, transport: str, folder: Path) -> tuple[dict[str, Target], int]:
    """Whom to call, and the process of the one that is served as by default."""
    path, asked = model("tiny", options.out), work("tiny", options.out)
    cert, key = certificate(folder)
    ca = cert.read_bytes() if transport == "TLS" else None

    def listen(name: str) -> dict[str, Any]:
        by = {"unix": {"socket": folder / name}, "TLS": {"tls_cert": cert, "tls_key": key}}
        return by.get(transport, {})

    def at(address: str, method: str = INFER) -> Target:
        return Target(address, asked.requests(), method, ca)

    found = {}
    for name, more in (("asyncio", ("--transport", "asyncio")), ("served", ())):
        words = [word for option, value in listen(name).items() for word in (f"--{option.replace('_', '-')}", value)]
        server = stack.enter_context(serving(path, *words, *more))
        found[name] = at(server.address)
    with calling(found["served"]) as caller:
        answer = caller.answers(1)[0]
    found["echo"] = at(ask(stack.enter_context(worker(Echo, path, {ECHO: answer}, listen("echo"))), "address"), ECHO)
    if transport == "TCP":
        found["thirty lines of asyncio"] = at(ask(stack.enter_context(worker(Naive, path)), "address"))
    return found, server.process


def added(options: Options) -> Iterator[Figure]:
    """What serving adds to the work itself, in units of an echo."""
    for kind in ("uint8", "float32", "jpeg", "tweets"):
        yield _added(options, kind)


def _added(options: Options, kind: str) -> Figure:
    asked = work(kind, options.out)
    with ExitStack() as stack:
        served, echo = _served_and_echo(stack, options, asked)
        inside = stack.enter_context(worker(InProcess, kind, options.out))
        sides: dict[str, Callable[[], Load]] = {
            "served": lambda: served.closed(1, options.seconds / 2),
            "inside": lambda: ask(inside, "closed", options.seconds / 2),
            "echo": lambda: echo.closed(1, options.seconds / 4),
        }
        found = in_turns(sides, 3 * options.rounds)
        paced = echo.open(1e3 / middle(found["served"], p50), options.seconds * 2)
    rounds = zip(found["served"], found["inside"], found["echo"], strict=True)
    value = median((served.p50 - inside.p50) / echo.p50 for served, inside, echo in rounds)
    said = ", ".join(f"{name} {middle(loads, p50):.3f} ms" for name, loads in found.items())
    said = f"{said}; an echo that comes as seldom {paced.p50:.3f} ms"
    return Figure("2", f"{kind}, c=1: (served - in process) / echo", value, "<=", 1.3, said)


def _served_and_echo(stack: ExitStack, options: Options, asked: Work) -> tuple[Callers, Callers]:
    requests = asked.requests()
    server = stack.enter_context(serving(model(asked.model, options.out)))
    served = stack.enter_context(calling(Target(server.address, requests)))
    answers = {ECHO: served.answers(1)[0]}
    echo = ask(stack.enter_context(worker(Echo, model("tiny", options.out), answers, {})), "address")
    return served, stack.enter_context(calling(Target(echo, requests, ECHO)))


def many(options: Options) -> Iterator[Figure]:
    """Eight clients of ResNet18, beside as many bare sessions of one thread as there are cores."""
    cores = cpu_count()
    found, kept = _eight_clients(options, cores)
    rates = {name: middle(loads, rate) for name, loads in found.items()}
    for name, goals in (("served", True), ("--max-batch 1", False)):
        loads, what = found[name], "uint8, c=8" if goals else f"the same, {name}"
        share = ratio(loads, found["sessions"], rate)
        said = f"{rates[name]:.0f} and {rates['sessions']:.0f} answers/s; at c=1 {rates['one client']:.0f}"
        limit = 0.95 if goals else None
        yield Figure("3", f"{what}: throughput / {cores} bare sessions of one thread", share, ">=", limit, said)
        said = f"{middle(loads, p50):.1f} and {middle(loads, p99):.1f} ms"
        spread = median(each.p99 / each.p50 for each in loads)
        yield Figure("3", f"{what}: p99 / p50", spread, "<=", 1.6 if goals else None, said)
    speeds, left = ([each[i] for each in kept] for i in (0, 1))
    share = median(speed / rates["served"] / cores_left for speed, cores_left in kept)
    said = f"{median(speeds):.0f} answers/s with {median(left):.0%} of the cores"
    yield Figure("3", "uint8, c=8, other work: throughput kept / core time left", share, ">=", 1.0, said)


def _eight_clients(options: Options, cores: int) -> tuple[dict[str, list[Load]], list[tuple[float, float]]]:
    """What came of each side, and what was kept while there was other work."""
    asked, seconds = work("uint8", options.out), 2 * options.seconds
    sides: dict[str, Callable[[], Load]] = {}
    with ExitStack() as stack:
        for name, words in (("served", ()), ("--max-batch 1", ("--max-batch", "1"))):
            server = stack.enter_context(serving(model(asked.model, options.out), *words))
            callers = stack.enter_context(calling(Target(server.address, asked.requests())))
            callers.closed(8, 1.0)  # then sessions that are made when they are needed are there
            sides[name] = partial(callers.closed, 8, seconds)
            sides.setdefault("one client", partial(callers.closed, 1, seconds / 2))
        pair = stack.enter_context(worker(SideBySide, "uint8", options.out, cores))
        found = in_turns(sides | {"sessions": partial(ask, pair, "closed", seconds)}, options.rounds)
        return found, [_kept(sides["served"], cores) for _ in range(options.rounds)]


def _kept(side: Callable[[], Load], cores: int) -> tuple[float, float]:
    """Answers a second while another process is busy, and the share of the cores that it left."""
    with competitor() as other:
        before, began = cpu_s(other), time.perf_counter()
        load = side()
        taken = (cpu_s(other) - before) / (time.perf_counter() - began)
    return load.rate, 1 - taken / cores


def batching(options: Options) -> Iterator[Figure]:
    """Sixteen clients of a model whose answers do not depend on their neighbours."""
    path, asked = model("joined", options.out), work("joined", options.out)
    with ExitStack() as stack:
        callers = {}
        for name, most in (("joined", "64"), ("alone", "1")):
            server = stack.enter_context(serving(path, "--max-batch", most))
            callers[name] = stack.enter_context(calling(Target(server.address, asked.requests())))
        answers = {name: each.answers(16) for name, each in callers.items()}
        sides = {name: partial(each.closed, 16, 2 * options.seconds) for name, each in callers.items()}
        found = in_turns(sides, options.rounds)
    rates = {name: middle(loads, rate) for name, loads in found.items()}
    said = f"{rates['joined']:.0f} and {rates['alone']:.0f} answers/s"
    share = ratio(found["joined"], found["alone"], rate)
    yield Figure("4", "tweets, c=16: throughput joined / one by one", share, ">=", 1.5, said)
    differ = sum(a != b for a, b in zip(*answers.values(), strict=True))
    yield Figure("4", f"answers that differ, of {len(asked.examples)}", differ, "<=", 0)


GOALS = {
    "tiny": tiny,
    "added": added,
    "many": many,
    "batching": batching,
    "idle": idle,
    "start": start,
    "memory": memory,
    "install": install,
}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/bench"), help="for the models (default demo/bench)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one side in one round (default 1)")
    parser.add_argument("--only", nargs="+", default=list(GOALS), choices=GOALS, metavar="NAME", help=" ".join(GOALS))
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/serve_speed.md and .json")
    chosen = parser.parse_args()
    os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "GRPC_EXPERIMENTS": "-event_engine_listener"}
    options = Options(chosen.out.resolve(), chosen.rounds, chosen.seconds)
    figures: dict[str, list[Figure]] = {name: [] for name in chosen.only}
    for name, found in figures.items():
        for figure in GOALS[name](options):
            print(figure.line(), file=sys.stderr, flush=True)
            found.append(figure)
    machine = f"{cpu_count()} cores {cpu_name()}, {datetime.now(UTC):%Y-%m-%d}"
    title = f"`make bench-serve`, {machine}; all are asked by benchmarks/http2.py, one process, one connection."
    print(f"{title}\n\n{table([figure for found in figures.values() for figure in found])}")
    if chosen.keep:
        keep("serve_speed", title, figures, list(GOALS))


if __name__ == "__main__":
    main()
