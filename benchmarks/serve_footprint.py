"""What the server takes while nobody calls: goals of benchmarks/serve_speed.py on time to start, memory and disk."""

import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.serve_figures import Figure, Options
from benchmarks.serve_load import Target, calling
from benchmarks.serve_models import model, work
from benchmarks.serve_sides import cpu_s, resident_mb, serving

ROOT = Path(__file__).resolve().parents[1]
IDLE_S = 20.0
STARTS = 5
RUNS = 50
BARE = f"""
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
given = session.get_inputs()
shapes = [[size if isinstance(size, int) else 1 for size in each.shape] for each in given]
types = {{"tensor(float)": "float32", "tensor(uint8)": "uint8"}}
feeds = {{each.name: numpy.zeros(shape, types[each.type]) for each, shape in zip(given, shapes)}}
for _ in range({RUNS}):
    session.run(None, feeds)
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))
"""
THEMSELVES = ("onnxruntime", "numpy", "pillow", "grpcio")
UNCOUNTED = ("pip", "setuptools")


def idle(options: Options) -> Iterator[Figure]:
    """CPU of a server that has answered and is asked nothing more."""
    asked = work("uint8", options.out)
    with serving(model(asked.model, options.out)) as server:
        with calling(Target(server.address, asked.requests())) as callers:
            callers.closed(8, 1.0)
        before = cpu_s(server.process)
        time.sleep(IDLE_S)
        used = (cpu_s(server.process) - before) / IDLE_S * 100
    yield Figure("5", f"idle for {IDLE_S:.0f} s after calls, ResNet18: % of a core", used, "<=", 0.5)


def start(options: Options) -> Iterator[Figure]:
    """Seconds from the start of the process until it is ready, without those for the model."""
    path = model("resnet18", options.out)
    graph = next(path.glob("*.onnx"))
    beyond, loaded, bare = [], [], []
    for _ in range(STARTS):
        with serving(path) as server:
            beyond.append(server.ready_s - server.loaded_s)
            loaded.append(server.loaded_s)
        began = time.perf_counter()
        load = "import numpy, onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1])"
        subprocess.run([sys.executable, "-c", load, str(graph)], check=True)
        bare.append(time.perf_counter() - began)
    said = f"load and self-test {median(loaded):.2f} s; a bare process with its session {median(bare):.2f} s"
    yield Figure("5", "ready beyond load and self-test, ResNet18: s", median(beyond), "<=", 0.5, said)


def memory(options: Options) -> Iterator[Figure]:
    """Resident memory above that of a bare process with the same session, after calls one by one."""
    for kind in ("tiny", "uint8"):
        asked = work(kind, options.out)
        path = model(asked.model, options.out)
        graph = path if path.is_file() else next(path.glob("*.onnx"))
        told = subprocess.run([sys.executable, "-c", BARE, str(graph)], check=True, capture_output=True, text=True)
        bare = int(told.stdout) * 1024 / 1e6
        with serving(path) as server, calling(Target(server.address, asked.requests()[:RUNS])) as callers:
            callers.answers(1)
            ours = resident_mb(server.process)
            callers.closed(8, 2.0)
            loaded = resident_mb(server.process)
        said = f"{ours:.0f} and {bare:.0f} MB; after 8 clients at once {loaded:.0f} MB"
        yield Figure("5", f"resident memory above a bare session's, {kind}: MB", ours - bare, "<=", 30, said)


def install(options: Options) -> Iterator[Figure]:
    """Bytes that `pip install 'edgeward[cpu]'` puts on the disk."""
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(Path(folder) / "bin" / "pip"), "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([*pip, f"{ROOT}[cpu]"], check=True, stdout=sys.stderr)
        (site,) = Path(folder).glob("lib/python*/site-packages")
        sizes = {each.metadata["Name"].lower(): _size(each) for each in distributions(path=[str(site)])}
    counted = {name: size for name, size in sizes.items() if name not in UNCOUNTED}
    themselves = sum(counted[name] for name in THEMSELVES)
    others = sorted(((size, name) for name, size in counted.items() if name not in THEMSELVES), reverse=True)
    said = ", ".join(f"{name} {size / 1e6:.1f}" for size, name in others[:6])
    ratio = sum(counted.values()) / themselves
    said = f"{sum(counted.values()) / 1e6:.0f} and {themselves / 1e6:.0f} MB; largest others: {said}"
    yield Figure("5", "edgeward[cpu] / onnxruntime, numpy, pillow and grpcio, on the disk", ratio, "<=", 1.35, said)


def _size(installed: Distribution) -> int:
    files = [file for file in installed.files or () if file.suffix != ".pyc"]
    return sum(Path(str(file.locate())).stat().st_size for file in files if Path(str(file.locate())).is_file())
