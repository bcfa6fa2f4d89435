"""Triton's perf_analyzer against `edgeward serve`: python benchmarks/perf_analyzer.py [--out DIR]

Its wheel needs glibc 2.38, so it runs with the libraries of a Debian 13 that debootstrap puts below the user's cache
(as root, once: apt-get install debootstrap). Two models, each called one by one and on a stream, with tensors in the
messages and in shared memory, by 1 and by 8 callers at the same time:

simple    The sum and the difference of 16 integers.
identity  A million bytes as they came.

Every run is kept as perf_analyzer's own CSV in DIR; run the command again after an interruption.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product, starmap
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import TensorProto, helper

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeward"
VERSION = "2.60.0"
LIMIT_S = 300.0  # of one run
MIRROR = "http://deb.debian.org/debian"
CONFIG = "max_batch_size: 8\ndynamic_batching {}\n"
COLUMNS = {
    "infer/s": "Inferences/Second",
    "queue µs": "Server Queue",
    "in µs": "Server Compute Input",
    "run µs": "Server Compute Infer",
    "out µs": "Server Compute Output",
    "p50 µs": "p50 latency",
    "p99 µs": "p99 latency",
}
"""Our heading -> the column of perf_analyzer's CSV. Its times of the server are what ModelStatistics told."""


class Run(NamedTuple):
    """One run of perf_analyzer."""

    model: str
    calls: str
    memory: str
    callers: int


def debian() -> Path:
    """The folder of a Debian 13, made where it is not there yet."""
    folder = CACHE / "debian13"
    if not folder.is_dir():
        if shutil.which("debootstrap") is None or os.geteuid() != 0:
            raise SystemExit(
                "perf_analyzer needs a Debian 13 folder: run this once as root, with debootstrap installed."
            )
        unfinished = CACHE / "debian13.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["debootstrap", "--variant=minbase", "trixie", unfinished, MIRROR], check=True, stdout=sys.stderr
        )
        unfinished.rename(folder)
    return folder


def program() -> Path:
    """The program in perf_analyzer's wheel, taken from PyPI where it is not there yet."""
    folder = CACHE / f"perf_analyzer-{VERSION}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=CACHE) as made:
            tag = f"manylinux_2_38_{platform.machine()}"
            which = ["--no-deps", "--only-binary=:all:", f"--platform={tag}", f"perf-analyzer=={VERSION}"]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", f"--dest={made}", *which]
            subprocess.run(pip, check=True, stdout=sys.stderr)
            with zipfile.ZipFile(next(Path(made).glob("*.whl"))) as wheel:
                wheel.extractall(Path(made) / "wheel")
            (Path(made) / "wheel").rename(folder)
    path = folder / "perf_analyzer" / "bin" / "perf_analyzer"
    path.chmod(0o755)
    return path


def write_models(root: Path) -> None:
    """A Triton-style repository of both models."""
    given, taken = ([_tensor(f"{kind}{i}", TensorProto.INT32, 16) for i in (0, 1)] for kind in ("INPUT", "OUTPUT"))
    pairs = (("Add", "OUTPUT0"), ("Sub", "OUTPUT1"))
    nodes = [helper.make_node(operator, ["INPUT0", "INPUT1"], [output]) for operator, output in pairs]
    _write_model(root, helper.make_graph(nodes, "simple", given, taken))
    given, taken = ([_tensor(name, TensorProto.UINT8, 1_000_000)] for name in ("INPUT", "OUTPUT"))
    nodes = [helper.make_node("Identity", ["INPUT"], ["OUTPUT"])]
    _write_model(root, helper.make_graph(nodes, "identity", given, taken))


def _tensor(name: str, kind: int, size: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["batch", size])


def _write_model(root: Path, graph: onnx.GraphProto) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = root / graph.name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    (root / graph.name / "config.pbtxt").write_text(CONFIG)


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of a server of its own process, which is stopped in the end."""
    command = [str(Path(sys.executable).with_name("edgeward")), "serve", str(root), "--port", "0", "--shared-memory"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("{") and json.loads(line).get("event") == "ready":
                yield json.loads(line)["address"]
                return
        raise SystemExit("the server did not start:\n" + "".join(lines))
    finally:
        process.terminate()
        process.communicate(timeout=60)


def measure(address: str, run: Run, out: Path, options: argparse.Namespace) -> list[str]:
    """What perf_analyzer says of a run, for each of COLUMNS. One that it finds unsteady is called so, and not kept."""
    path = out / f"{'-'.join(map(str, run))}.csv"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        arguments = [
            *("-m", run.model, "-i", "grpc", "-u", address, "-f", str(unfinished)),
            *("--concurrency-range", str(run.callers), "--shared-memory", run.memory),
            *("--measurement-interval", str(options.window_ms), "--stability-percentage", str(options.stable)),
            "--streaming" if run.calls == "stream" else "-a",
        ]
        print("perf_analyzer", *arguments, file=sys.stderr, flush=True)
        ended = subprocess.run(
            [*loader(), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S
        )
        print(ended.stdout, file=sys.stderr, flush=True)
        if "Failed to obtain stable measurement" in ended.stdout:
            return ["unsteady", *[""] * (len(COLUMNS) - 1)]
        if ended.returncode:
            raise SystemExit(f"perf_analyzer ended with {ended.returncode}; its words stand above.")
        unfinished.rename(path)
    with path.open() as file:
        row = next(csv.DictReader(file))
    return [row[column] for column in COLUMNS.values()]


def loader() -> list[str]:
    """The command that runs the program with Debian 13's libraries; this machine's network and shared memory stay."""
    system = debian()
    libraries = [system / "usr/lib" / f"{platform.machine()}-linux-gnu", system / "usr/lib"]
    start = next(path for each in libraries for path in each.glob("ld-linux*.so.*"))
    return [str(start), "--library-path", ":".join(map(str, libraries)), str(program())]


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (default: a new one)")
    parser.add_argument("--window-ms", type=int, default=1000, help="of one measurement, of which three must agree")
    parser.add_argument("--stable", type=int, default=10, help="percent by which those may differ (default 10)")
    options = parser.parse_args()
    out: Path = options.out or Path(tempfile.mkdtemp(prefix="perf_analyzer-"))
    out.mkdir(parents=True, exist_ok=True)
    loader()
    headings = [*Run._fields, *COLUMNS]
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    with tempfile.TemporaryDirectory() as root:
        write_models(Path(root))
        with serving(Path(root)) as address:
            for run in starmap(Run, product(("simple", "identity"), ("unary", "stream"), ("none", "system"), (1, 8))):
                print(f"| {' | '.join([*map(str, run), *measure(address, run, out, options)])} |", flush=True)
    print(f"\nperf_analyzer {VERSION}; what it wrote is in {out}")


if __name__ == "__main__":
    main()
