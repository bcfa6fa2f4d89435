"""How format-3-* were made, once: `python -m tests.golden.make_format_3 tests/golden`. They are kept as they are.

As in make_format_1.py, the answers are the same bits on every machine: in float16, too, which the numbers all fit.
"""

import sys
from pathlib import Path

import msgspec
import numpy as np
from onnx import TensorProto, helper

from bundle import manifest, store, vector
from tests.golden import make_format_1 as first

POINT = manifest.VectorInput(column="point", size=4)
SIDE = manifest.Multiclass(name="side", labels=("left", "right", "neither"))
WEIGHTS = np.random.default_rng(3).integers(-4, 4, (POINT.size, len(SIDE.labels)))

node, tensor = helper.make_node, helper.make_tensor_value_info


def graph(precision: str) -> bytes:
    """logits (N, 3) = features (N, 4) @ WEIGHTS, in this precision."""
    dtype, number = (np.float16, TensorProto.FLOAT16) if precision == "fp16" else (np.float32, TensorProto.FLOAT)
    nodes = [
        node("Cast", ["features"], ["numbers"], to=number),
        node("MatMul", ["numbers", "weights"], ["products"]),
        node("Cast", ["products"], ["logits"], to=TensorProto.FLOAT),
    ]
    inputs = [tensor("features", TensorProto.FLOAT, ["N", POINT.size])]
    outputs = [tensor("logits", TensorProto.FLOAT, ["N", len(SIDE.labels)])]
    return first.model(nodes, inputs, outputs, {"weights": WEIGHTS.astype(dtype)})


def add_variants(path: Path) -> None:
    """Give the bundle a variant for each device, of which two were added on other machines than its own."""
    sealed = store.open_bundle(path).manifest
    (variant,) = sealed.variants
    variant = msgspec.structs.replace(variant, rows_per_s=20000.0)
    elsewhere = msgspec.structs.replace(sealed.provenance, created="2026-11-22T00:00:00Z", cpu="another")
    (path / "variants/fp16.onnx").write_bytes(graph("fp16"))
    gate = manifest.GateRecord(
        verdict="PASS",
        metric="macro_f1",
        examples=1000,
        reference=0.9,
        served=0.9,
        drop=0.0,
        drop_upper=0.005,
        budget=0.01,
        confidence=0.95,
        disagreement=0.0,
        disagreement_upper=0.003,
        examples_needed=None,
    )
    arm = {"name": "fp32.arm64-asimddp", "isa": "arm64-asimddp", "built": elsewhere}
    gpu = {"file": "variants/fp16.onnx", "precision": "fp16", "gate": gate, "built": elsewhere, "isa": "sm90"}
    changes = (
        {},
        arm,
        gpu | {"name": "fp16.sm90", "device": "cuda"},
        gpu | {"name": "fp16-tensorrt.sm90", "device": "tensorrt"},
    )
    variants = tuple(msgspec.structs.replace(variant, **change) for change in changes)
    goldens = tuple(
        msgspec.structs.replace(each, logits={one.name: each.logits["fp32"] for one in variants})
        for each in sealed.goldens
    )
    store.seal(path, msgspec.structs.replace(sealed, variants=variants, goldens=goldens))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    raws = [vector.encode(np.array(row)) for row in ([0.5, -1, 2, 0], [-0.0, 3, 0.25, 8])]
    named = {f"goldens/{number}.raw": raw for number, raw in enumerate(raws)}
    out = folder / "format-3-variants"
    first.write(out, "variants", POINT, (SIDE,), graph("fp32"), named, {}, command="tests/golden/make_format_3.py")
    add_variants(out)
