"""Dense layers on feature vectors, 100 -> 100 -> 10: python examples/dense.py [--out DIR]

The vectors are scikit-learn's digits, scaled to 10 × 10 grey values. Source task: the digits 0 to 4, on half of the
images. Target task: all ten digits, on the other half, of which few are trained on; the hidden layer comes from the
source task and is frozen, or trained too. Then three tasks at once in one bundle, on a Parquet table whose labels are
missing here and there: the digit, its traits, and by how many degrees the image was turned.
"""

import argparse
import json
from pathlib import Path
from shlex import split

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from examples import steps
from examples.digits import digits, enlarged, traits, turned

SOURCE = 900  # images
MISSING = 0.25  # of the labels of the table


def vectors(images: list) -> np.ndarray:
    """Float32 (N, 100), grey values from 0 to 1."""
    return np.stack([np.asarray(image, np.float32).ravel() / 255 for image in enlarged(images, 10)])


def write_arrays(path: Path, places: np.ndarray) -> None:
    """Write some of the images as .npz: x float32 (N, 100), y int64 (N,)."""
    images, labels = digits()
    np.savez(path, x=vectors([images[i] for i in places]), y=labels[places])


def write_table(path: Path) -> None:
    """Write all images, each turned, with three label columns."""
    images, labels = digits()
    chance = np.random.default_rng(0)
    degrees = chance.uniform(-30, 30, len(labels)).round(1)
    missing = chance.random((len(labels), 3)) < MISSING
    missing[missing.all(axis=1)] = False  # a row needs one label
    x = vectors(turned(enlarged(images, 40), degrees))
    targets = {
        "digit": [str(label) for label in labels],
        "traits": [traits(label) for label in labels],
        "turn": degrees.tolist(),
    }
    table = {f"p{i:02}": x[:, i] for i in range(100)}
    for column, (name, values) in enumerate(targets.items()):
        table[name] = [None if gone else value for value, gone in zip(values, missing[:, column], strict=True)]
    parquet.write_table(pa.table(table), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/dense"))
    options = parser.parse_args()
    out = steps.begin(options.out)
    _, labels = digits()
    write_arrays(out / "source.npz", np.flatnonzero(labels[:SOURCE] < 5))
    write_arrays(out / "target.npz", np.arange(SOURCE, len(labels)))
    write_table(out / "tasks.parquet")
    np.save(out / "one.npy", np.load(out / "target.npz")["x"][:1])

    source, frozen = out / "source.checkpoint", out / "frozen.checkpoint"
    scratch = ["mlp", out / "source.npz", *split("--widths 100 --epochs 20 --no-preflight")]
    steps.run(steps.EDGEWARD, "finetune", *scratch, "--out", source)
    target = [f"checkpoint:{source}", out / "target.npz", *split("--split 0.35 0.15 0.1 0.4")]
    told = steps.run(steps.EDGEWARD, "finetune", *target, "--strategy", "probe", "--out", frozen, "--json")
    print(f"hidden layer frozen: validation accuracy {json.loads(told)['metrics']['accuracy']:.4f}")
    trained = steps.pipeline(
        out,
        "digits",
        [*target, *split("--strategy full --learning-rate 1e-3 --epochs 20")],
        modality="vector",
        features=steps.numbers,
        ask=[out / "one.npy"],
    )
    labels_of = split("--label-column digit --label-column traits:multilabel --label-column turn:regression:0.5")
    together = steps.pipeline(
        out,
        "tasks",
        ["mlp", out / "tasks.parquet", *split("--widths 100 --epochs 20 --split 0.6 0.1 0.1 0.2"), *labels_of],
        modality="vector",
        features=steps.numbers,
        ask=[out / "one.npy"],
    )
    steps.finish(trained, together)


if __name__ == "__main__":
    main()
