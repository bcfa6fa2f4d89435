"""A model that edgeward did not train, compiled and served: python examples/own_onnx.py [--out DIR]

The model is scikit-learn's MLPClassifier, fitted on some of its digits and written as ONNX by hand, with the softmax
at its end that most exporters write. The others are the data, of which one part calibrates int8, one chooses and one
gates; all of them are asked of the server, whose answers stand beside scikit-learn's own.
"""

import argparse
import json
from pathlib import Path
from shlex import split

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from examples import steps
from serve.client import Client

FITTED = 800  # images that scikit-learn learns from


def to_onnx(model: MLPClassifier) -> onnx.ModelProto:
    """The fitted network: `pixels` float32 (N, 64) to `probabilities` float32 (N, 10)."""
    nodes, weights, value = [], [], "pixels"
    layers = list(zip(model.coefs_, model.intercepts_, strict=True))
    for i, (matrix, bias) in enumerate(layers):
        weights.append(numpy_helper.from_array(matrix.astype(np.float32), f"weight{i}"))
        weights.append(numpy_helper.from_array(bias.astype(np.float32), f"bias{i}"))
        nodes.append(helper.make_node("Gemm", [value, f"weight{i}", f"bias{i}"], [f"sum{i}"], f"layer{i}"))
        value = f"sum{i}"
        if i < len(layers) - 1:
            nodes.append(helper.make_node("Relu", [value], [f"hidden{i}"]))
            value = f"hidden{i}"
    nodes.append(helper.make_node("Softmax", [value], ["probabilities"], axis=1))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/own_onnx"))
    out = steps.begin(parser.parse_args().out)
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    model = MLPClassifier((512, 512), early_stopping=True, random_state=0).fit(pixels[:FITTED], labels[:FITTED])
    onnx.save(to_onnx(model), out / "mlp.onnx")
    np.savez(out / "digits.npz", pixels=pixels[FITTED:], y=labels[FITTED:])
    np.savez(out / "two.npz", pixels=pixels[FITTED : FITTED + 2])

    bundle = out / "mlp"
    steps.run(
        steps.EDGEWARD, "export", out / "mlp.onnx", *split("--effort fast --data"), out / "digits.npz", "--out", bundle
    )
    report = json.loads((bundle / "report.json").read_bytes())
    with steps.served(bundle) as address:
        steps.run(steps.EDGEWARD, "infer", address, "mlp", out / "two.npz")
        with Client(address) as client:
            answers = client.predict("mlp", {"pixels": pixels[FITTED:]})
    truth, served, theirs = labels[FITTED:], answers["label"][:, 0].astype(int), model.predict(pixels[FITTED:])
    right, as_many = np.mean(served == truth), np.bincount(truth).max() / len(truth)
    print(f"{report['shipped']} is served; examples: {report['examples']}")
    print(f"accuracy on {len(truth)} images: served {right:.4f}, scikit-learn {np.mean(theirs == truth):.4f}")
    print(f"the same answer on {np.mean(served == theirs):.4f} of them")
    steps.finish(bool(right >= as_many))


if __name__ == "__main__":
    main()
