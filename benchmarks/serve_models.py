"""What benchmarks/serve_speed.py serves, made once and kept, and requests for it that are serialised beforehand.

tiny      100 -> 100 -> 10, float32; no bundle, and without a gate.
resnet18  A bundle of a ResNet18, int8, at 224 × 224 pixels: JPEG in, label out; as resnet18.onnx uint8 in, logits out.
float     The same graph, with pixels float32 (N, 3, height, width) in [0, 1] in, logits out; without a gate.
text      A bundle of MiniLM, int8: tweets of all lengths in, label out.
joined    The same with other int8, whose answers do not depend on neighbours: its requests can be joined to one run.
"""

import csv
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from shlex import split
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pyarrow import parquet

from benchmarks import score_inputs
from benchmarks.serve_load import Load
from bundle.model import load_model
from bundle.session import Session
from serve.client.calls import infer_request

SIDE = 224  # of an image, pixels
PICTURES = 400  # that the ResNet18's head is fitted to; it matters to nobody how well
REQUESTS = 64  # different ones of each kind, sent in turn


@dataclass(frozen=True)
class Work:
    """Requests to one model; examples are the arrays of its inputs, uint8 (1, height, width, 3) and so on."""

    model: str
    served: str  # name that it is asked for by
    examples: tuple[dict[str, np.ndarray], ...]
    outputs: tuple[str, ...] = ()  # all where there is none

    def requests(self) -> tuple[bytes, ...]:
        """As they go over the wire."""
        made = (infer_request(self.served, example, "", self.outputs) for example in self.examples)
        return tuple(request.SerializeToString() for request in made)


def work(kind: str, out: Path) -> Work:
    """What is asked: tiny, uint8, float32, jpeg, tweets, or joined, which is tweets for another model."""
    chance = np.random.default_rng(1)
    match kind:
        case "tiny":
            return Work("tiny", "tiny", _each("x", (chance.random((1, 100), np.float32) for _ in range(REQUESTS))))
        case "uint8":
            return Work("resnet18", "resnet18.onnx", _each("image", (_pixels(each)[None] for each in _files(out))))
        case "float32":
            made = (chance.random((1, 3, SIDE, SIDE), np.float32) for _ in range(REQUESTS))
            return Work("float", "float", _each("x", made))
        case "jpeg":
            raws = (np.array([[each.read_bytes()]], object) for each in _files(out))
            return Work("resnet18", "resnet18", _each("image", raws), ("label",))
    texts = parquet.read_table(score_inputs.rows("text", REQUESTS, out))["text"].to_pylist()
    served = kind if kind == "joined" else "text"
    return Work(served, served, _each("text", (np.array([[text.encode()]], object) for text in texts)), ("label",))


def _each(name: str, arrays: Any) -> tuple[dict[str, np.ndarray], ...]:
    return tuple({name: array} for array in arrays)


def _files(out: Path) -> list[Path]:
    return sorted(score_inputs.rows("images", PICTURES, out).iterdir())[:REQUESTS]


def _pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB").resize((SIDE, SIDE)))


class InProcess:
    """The same work without a server, with the settings that a server would take."""

    def __init__(self, kind: str, out: Path, threads: int | None = None) -> None:
        """Load the model.

        Args:
            kind: see `work`.
            out: where models are kept.
            threads: of one run; by default as a server without options.
        """
        asked = work(kind, out)
        path = model(asked.model, out)
        if asked.outputs:  # a bundle: raw examples in, answers out
            predict = load_model(path, threads=threads).predict
            raws = [[each.item() for each in example.values()] for example in asked.examples]
            self._turns = [partial(predict, raw) for raw in raws]
        else:
            graph = path.read_bytes() if path.is_file() else None
            session = Session(graph, threads=threads) if graph else load_model(path, threads=threads).session
            self._turns = [partial(session.run, example) for example in asked.examples]

    def closed(self, seconds: float) -> Load:
        """One after the other."""
        start = now = time.perf_counter()
        latencies = []
        for turn in cycle(self._turns):
            began = time.perf_counter()
            turn()
            now = time.perf_counter()
            latencies.append(now - began)
            if now >= start + seconds:
                break
        return Load(np.array(latencies), now - start)


class SideBySide:
    """Several of them, each with a thread of its own and one thread a run."""

    def __init__(self, kind: str, out: Path, count: int) -> None:
        self._each = [InProcess(kind, out, threads=1) for _ in range(count)]

    def closed(self, seconds: float) -> Load:
        """Each one after the other, all at the same time."""
        with ThreadPoolExecutor(len(self._each)) as pool:
            loads = list(pool.map(lambda one: one.closed(seconds), self._each))
        return Load(np.concatenate([load.latencies for load in loads]), max(load.seconds for load in loads))


def model(name: str, out: Path) -> Path:
    """The bundle or graph of that name, made below `out` unless it is there."""
    path = out / (f"{name}.onnx" if name in ("tiny", "float") else name)
    if name == "text":
        return score_inputs.bundle("text", out)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        MAKING[name](path, out)
    return path


def _make_tiny(path: Path, out: Path) -> None:
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


def _make_resnet18(path: Path, out: Path) -> None:
    checkpoint = out / "resnet18.checkpoint"
    if not checkpoint.exists():
        options = split(f"--weights none --image-size {SIDE} --strategy probe --split 0.4 0.1 0.2 0.3")
        _edgeward("finetune", "torchvision:resnet18", _labelled(out), *options, "--out", checkpoint)
    _export(checkpoint, path, "int8-static")


def _labelled(out: Path) -> Path:
    """A table of the pictures and the digits on them."""
    from examples.digits import digits

    path, pictures = out / "pictures.csv", score_inputs.rows("images", PICTURES, out)
    with path.open("w", newline="") as file:
        lines = zip(sorted(pictures.iterdir()), digits()[1], strict=False)
        csv.writer(file).writerows([("image", "label"), *((each.resolve(), label) for each, label in lines)])
    return path


def _make_float(path: Path, out: Path) -> None:
    whole = onnx.load(next(model("resnet18", out).glob("*.onnx")))
    image = whole.graph.input[0].name
    del whole.graph.input[:]
    whole.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, SIDE, SIDE]))
    whole.graph.initializer.append(numpy_helper.from_array(np.float32(255), "x.most"))
    before = [
        helper.make_node("Mul", ["x", "x.most"], ["x.scaled"]),
        helper.make_node("Cast", ["x.scaled"], ["x.pixels"], to=TensorProto.UINT8),
        helper.make_node("Transpose", ["x.pixels"], [image], perm=[0, 2, 3, 1]),
    ]
    nodes = [*before, *whole.graph.node]
    del whole.graph.node[:]
    whole.graph.node.extend(nodes)
    onnx.save(whole, path)


def _make_joined(path: Path, out: Path) -> None:
    model("text", out)
    _export(out / "text" / "checkpoint", path, "int8-static")


def _export(checkpoint: Path, path: Path, variant: str) -> None:
    options = split(f"--variant {variant} --max-drop 100 --no-cache")  # of latencies, which are measured anew
    _edgeward("export", checkpoint, "--out", path, "--name", path.name, *options)


def _edgeward(*command: str | Path) -> None:
    words = [score_inputs.EDGEWARD, *map(str, command)]
    print("$", *words, file=sys.stderr, flush=True)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


MAKING = {
    "tiny": _make_tiny,
    "resnet18": _make_resnet18,
    "float": _make_float,
    "joined": _make_joined,
}
