"""Our server beside others: python -m benchmarks.serve_peers [--only PEER ...] [--models MODEL ...]

Each server has a virtual environment of its own below the user's cache, and serves the same ONNX file, float32 in and
out, on loopback; one more process sends requests. Rounds are interleaved: each server in each round, and while one is
asked all others are frozen. Medians over the rounds, p99 of the calls of all rounds; ratios are of the same round. A
server is ready when it answers for the first time, and that answer is held to that of the session alone.

tiny   100 -> 100 -> 10; the peers' sessions have one thread.
float  ResNet18, int8, 224 × 224 pixels, 600 KB a request; the peers' sessions have a thread for each core.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.export_peers import SILENT, environment
from benchmarks.peers.serve_installed import requirements, size_mb, versions
from benchmarks.peers.serve_process import Server
from benchmarks.peers.serve_shared import free_port
from benchmarks.peers.serve_wires import Asker, Wire, wire
from benchmarks.serve_load import Load, worker
from benchmarks.serve_models import model
from bundle.host import cpu_name

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "serve_peers"
PEERS = {  # and how each is asked; after "-" stands one more argument of its script
    "edgeward": "v2",
    "naive": "v2",
    "triton": "v2",
    "triton-2": "v2",
    "mlserver": "v2",
    "bentoml": "bentoml",
    "ray": "v2",
    "litserve": "http",
}
MODELS = {"tiny": 1, "float": os.cpu_count() or 1}  # threads of the peers' sessions
LOADS = (1, 8)  # calls that are under way
READY_S, ANSWER_S = 90.0, 60.0
QUIET = SILENT | {
    "BENTOML_DO_NOT_TRACK": "True",
    "OTEL_SDK_DISABLED": "true",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own ports on loopback
    "RAY_USAGE_STATS_ENABLED": "0",
}
COLUMNS = ("server", "c=1 p50 ms", "× ours", "c=1 p99 ms", "c=8 answers/s", "× ours", "c=8 p99 ms", "RSS MB")
COLUMNS += ("ready after s", "installed MB")


@dataclass
class Side:
    """A server that takes part, and what was measured of it."""

    name: str
    python: str
    error: str | None = None
    ready_s: float = 0.0
    difference: float = 0.0  # largest, of a number of the answer and the session's
    rss_mb: float = 0.0
    pss_mb: float = 0.0
    loads: dict[int, list[Load]] = field(default_factory=lambda: {load: [] for load in LOADS})
    server: Server | None = None
    asker: Any = None

    def ask(self, limit_s: float, *question: Any) -> Any:
        """What the side's asker gives; a text is a fault."""
        try:
            self.asker.send(question)
            return self.asker.recv() if self.asker.poll(limit_s) else f"no answer within {limit_s:.0f} s"
        except (EOFError, OSError) as error:
            return f"what asks it has ended: {error}"

    def p50(self, in_flight: int) -> list[float]:
        """Of each round, ms."""
        return [load.p50 for load in self.loads[in_flight]]

    def rate(self, in_flight: int) -> list[float]:
        """Of each round, answers a second."""
        return [load.rate for load in self.loads[in_flight]]

    def p99(self, in_flight: int) -> float:
        """Of the calls of all rounds, ms."""
        return float(np.percentile(np.concatenate([load.latencies for load in self.loads[in_flight]]), 99) * 1e3)


def make_side(name: str) -> Side:
    """With its environment."""
    package = name.partition("-")[0]
    try:
        return Side(name, environment(f"serve_{package}", requirements(package)))
    except subprocess.CalledProcessError as error:
        return Side(name, "", error=f"its environment could not be made: pip's exit code is {error.returncode}")


def command(side: Side, path: Path, port: int, threads: int) -> list[str]:
    """That starts a server."""
    if side.name == "edgeward":
        return [side.python, "-m", "edgeward", "serve", str(path), "--port", str(port)]
    package, *more = side.name.split("-")
    return [side.python, str(script(package)), str(path), str(port), str(threads), *more]


def script(package: str) -> Path:
    """That starts a peer's server."""
    return HERE / "peers" / f"serve_{package}.py"


@contextmanager
def started(side: Side, path: Path, threads: int) -> Iterator[None]:
    """A server that has answered once, rightly, and is frozen; or the side's error says why not."""
    session = onnxruntime.InferenceSession(path)
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    x = np.random.default_rng(0).normal(size=(1, *given.shape[1:])).astype(np.float32)
    tensors = {"input": (given.name, len(given.shape)), "output": (answer.name, len(answer.shape))}
    to = wire(PEERS[side.name], free_port(), path.stem, x, given.name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, worker(Asker, to) as side.asker:
        variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        variables |= QUIET | {"PYTHONPATH": str(HERE.parent), "MODEL_TENSORS": json.dumps(tensors)}
        variables |= {"HOME": folder, "TMPDIR": folder}  # what a peer writes for its user ends with it
        side.server = Server(command(side, path, to.port, threads), Path(folder), variables)
        try:
            side.error = greeted(side, to, session.run(None, {given.name: x})[0].ravel())
            side.server.freeze()
            yield
        finally:
            side.server.stop()


def greeted(side: Side, to: Wire, expected: np.ndarray) -> str | None:
    """Wait for the first answer; say what is wrong with it."""
    assert side.server is not None
    told = side.ask(READY_S + 10, "first", READY_S)
    if isinstance(told, str):
        return side.server.ended() or f"no answer within {READY_S:.0f} s: {told}"
    data, moment = told
    side.ready_s = moment - side.server.started
    got = to.answer(data)
    if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-4, atol=1e-4):
        return f"its answer is not the session's: {got[:3]}, not {expected[:3]}"
    side.difference = float(np.abs(got - expected).max())
    return None


def measure(taking_part: Sequence[Side], rounds: int, seconds: float) -> None:
    """Each of the servers in each round."""
    for in_flight in LOADS * rounds:
        for side in taking_part:
            if side.error is None and side.server is not None:
                side.server.thaw()
                load = side.ask(ANSWER_S, "closed", in_flight, seconds)
                side.server.freeze()
                if isinstance(load, str):
                    side.error = f"{in_flight} calls at the same time: {load}"
                else:
                    side.loads[in_flight].append(load)


def measured(name: str, path: Path, taking_part: Sequence[Side], rounds: int, seconds: float) -> None:
    """All servers of one model."""
    with ExitStack() as stack:
        for side in taking_part:
            if side.error is None:
                print(f"{name}: {side.name} ...", file=sys.stderr)
                stack.enter_context(started(side, path, MODELS[name]))
        measure(taking_part, rounds, seconds)
        for side in taking_part:
            if side.error is None and side.server is not None:
                side.rss_mb, side.pss_mb = side.server.memory()


def told(side: Side, ours: Side) -> dict[str, Any]:
    """A row as JSON has it; lists are of the rounds."""
    if side.error is not None:
        return {"server": side.name, "error": side.error}
    loads = {f"c{c}": {"p50_ms": side.p50(c), "p99_ms": side.p99(c), "answers_s": side.rate(c)} for c in LOADS}
    rest = {"ready_s": side.ready_s, "rss_mb": side.rss_mb, "pss_mb": side.pss_mb, "difference": side.difference}
    ratios = {"p50_c1": ratio(side.p50(1), ours.p50(1)), "answers_s_c8": ratio(side.rate(8), ours.rate(8))}
    return {"server": side.name, "versions": versions(side.python), **loads, "to_ours": ratios, **rest}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float | None:
    """Median of the rounds'; None where ours was not measured."""
    return median(b / a for a, b in zip(ours, theirs, strict=True)) if ours else None


def row(figures: dict[str, Any], installed_mb: float) -> str:
    """A line of the table."""
    if "error" in figures:
        return f"| {figures['server']} | {figures['error'].replace('|', '/')} |{' |' * (len(COLUMNS) - 2)}"
    one, eight, ratios = figures["c1"], figures["c8"], figures["to_ours"]
    slower, faster = (f"{each:.2f}" if each else "" for each in (ratios["p50_c1"], ratios["answers_s_c8"]))
    latency = [f"{median(one['p50_ms']):.2f}", slower, f"{one['p99_ms']:.2f}"]
    throughput = [f"{median(eight['answers_s']):,.0f}", faster, f"{eight['p99_ms']:.1f}"]
    rest = [f"{figures['rss_mb']:.0f}", f"{figures['ready_s']:.1f}", f"{installed_mb:.0f}"]
    return f"| {' | '.join([figures['server'], *latency, *throughput, *rest])} |"


def table(rows: Sequence[dict[str, Any]], installed: dict[str, float]) -> str:
    """By latency, those that failed last."""
    ranked = sorted(rows, key=lambda each: (median(each["c1"]["p50_ms"]) if "c1" in each else np.inf, each["server"]))
    head = [f"| {' | '.join(COLUMNS)} |", f"|---{'|---:' * (len(COLUMNS) - 1)}|"]
    return "\n".join([*head, *(row(each, installed.get(each["server"], 0.0)) for each in ranked)])


def settings(name: str) -> str:
    """What its script tells of itself."""
    package, *more = name.split("-")
    if package == "edgeward":
        return "`edgeward serve MODEL.onnx`, without options."
    if more:
        return f"The same with {more[0]} instances of one thread each."
    return (ast.get_docstring(ast.parse(script(package).read_text())) or "").partition("\n")[0]


def described(found: dict[str, list[dict[str, Any]]], taking_part: Sequence[Side], options: argparse.Namespace) -> str:
    """The page that is kept."""
    installed = {side.name: size_mb(side.python) for side in taking_part if side.python}
    lengths = f"{options.rounds} rounds of {options.seconds:g} s, of {2 * options.seconds:g} s for float"
    meant = "c: calls under way. × ours: the figure divided by ours"
    parts = ["# Servers, side by side", f"`{typed()}`", f"{cpu_name()}, {os.cpu_count()} cores. {lengths}. {meant}."]
    abouts = {line.split()[0]: line for line in (__doc__ or "").strip().splitlines()[-len(MODELS) :]}
    for name, rows in found.items():
        parts += [f"## {abouts[name]}", table(rows, installed)]
    parts.append("\n".join(f"- {side.name}: {settings(side.name)} {listed(side)}" for side in taking_part))
    return "\n\n".join(parts) + "\n"


def typed() -> str:
    """The command."""
    return " ".join(["python -m benchmarks.serve_peers", *sys.argv[1:]])


def listed(side: Side) -> str:
    """Versions of what it consists of."""
    found = versions(side.python) if side.python else {}
    return "; ".join(f"{name} {version}" for name, version in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PEERS, default=list(PEERS), help="some of the servers")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="one of the models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each server in each round and load (default 1)")
    parser.add_argument("--out", type=Path, default=Path("demo/bench"), help="for the models (default demo/bench)")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/serve_peers.md and .json")
    options = parser.parse_args()
    found = {}
    for name in options.models:
        taking_part = [make_side(each) for each in options.only]
        path = model(name, options.out).resolve()
        measured(name, path, taking_part, options.rounds, options.seconds * (2 if name == "float" else 1))
        ours = next(
            (side for side in taking_part if (side.name, side.error) == ("edgeward", None)), Side("edgeward", "")
        )
        found[name] = [told(side, ours) for side in taking_part]
    page = described(found, taking_part, options)
    print(page)
    if options.keep:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.with_suffix(".md").write_text(page)
        kept = {"command": typed(), "cpu": cpu_name(), "models": found}
        RESULTS.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
