"""Which quantization helps: python benchmarks/quantizers.py [--models NAME ...] [--seeds 2] [--rows 800]

minilm        A probe on MiniLM, tweets of three moods.
resnet18      First trained on other digits, then on all ten, at 32 × 32 pixels: see strategies.py.
efficientnet  A probe on EfficientNet-Lite0, handwritten digits at 224 × 224 pixels.
mobilenet     MobileNetV3-small, trained on handwritten digits from random weights at 32 × 32 pixels.

Each is quantized in every way. The drop is accuracy of fp32 less that of int8 on the selection split, in points, the KL
divergence that from the labels' probabilities in fp32 to those in int8, in millinats; leftovers are conversions between
int8 and fp32 that ONNX Runtime left in the graph; the ratio is latency by that of fp32, at batch 1, with one thread.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

CALIBRATION = 100  # examples
SIDE = 32  # pixels of an image for MobileNetV3
MODELS = ("minilm", "resnet18", "efficientnet", "mobilenet")


def train_checkpoint(name: str, folder: Path, rows: int, seed: int) -> Path:
    """Write the data and train on it; a seed decides the splits, the first weights and the order of the examples."""
    from benchmarks import refit, strategies
    from finetune.train import TrainConfig, train

    job: dict[str, Any]
    match name:
        case "minilm":
            job = strategies.tweets_job(folder, rows)
        case "resnet18":
            job = strategies.digits_job(folder, rows) | {"strategy": "full", "epochs": 5}
        case "efficientnet":
            model, data = refit.job("digits", folder, rows)
            job = {"model": model, "data": str(data)}
        case "mobilenet":
            job = {"model": f"python:{__file__}:mobilenet", "data": str(enlarged_digits(folder, rows))}
            job |= {"strategy": "full", "optimizer": "adamw", "learning_rate": 2e-3, "epochs": 30}
    config = TrainConfig(**job, out=folder / "checkpoint", seed=seed, split=(0.4, 0.1, 0.45, 0.05), cache=False)
    train(config)
    return config.out


def enlarged_digits(folder: Path, rows: int) -> Path:
    from examples.digits import digits, enlarged

    images, labels = digits()
    for number in random.Random(0).sample(range(len(images)), rows):
        place = folder / "digits" / str(labels[number])
        place.mkdir(parents=True, exist_ok=True)
        enlarged([images[number]], SIDE)[0].save(place / f"{number:04}.png")
    return folder / "digits"


def mobilenet() -> Any:
    """MobileNetV3-small whose batch norms follow a short training: torchvision's own average over 100 batches."""
    from torch import nn
    from torchvision.models import mobilenet_v3_small

    from bundle.manifest import ImageInput

    half = (0.5, 0.5, 0.5)
    spec = ImageInput(
        column="image", height=SIDE, width=SIDE, resize=SIDE, interpolation="bilinear", mean=half, std=half
    )
    return mobilenet_v3_small(norm_layer=lambda width: nn.BatchNorm2d(width, eps=1e-3, momentum=0.1)), spec


def mse(histogram: Any) -> tuple[float, float]:
    """The range of least expected squared error of 8 bits, over the histogram; one side is shrunk after the other."""
    import numpy as np

    centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    used = histogram.counts > 0
    centres, counts = centres[used], histogram.counts[used]
    low, high = min(histogram.least, 0.0), max(histogram.greatest, 0.0)

    def error(low: float, high: float) -> float:
        step = max(high - low, 1e-30) / 255
        held = np.clip(np.rint((centres - low) / step), 0, 255) * step + low
        return float(counts @ (centres - held) ** 2)

    for _ in range(2):
        high = min(np.linspace(0.2, 1, 81) * high, key=lambda one: error(low, one))
        low = min(np.linspace(0.2, 1, 81) * low, key=lambda one: error(one, high))
    return float(low), float(high)


def entropy(histogram: Any) -> tuple[float, float]:
    """The threshold of least KL divergence between the clipped magnitudes and 128 levels of them.

    Migacz 2017, 8-bit inference with TensorRT (GTC S7310), as onnxruntime.quantization.calibrate has it.
    """
    import numpy as np

    magnitude = np.abs((histogram.edges[:-1] + histogram.edges[1:]) / 2)
    top = max(-histogram.least, histogram.greatest)
    counts, edges = np.histogram(magnitude, 2048, (0, max(top, 1e-30)), weights=histogram.counts)
    best, chosen = np.inf, top
    for size in range(128, 2049, 16):
        held = counts[:size].copy()
        reference = held.copy()
        reference[-1] += counts[size:].sum()
        level = np.arange(size) * 128 // size
        filled = np.bincount(level, reference > 0, minlength=128)
        total = np.bincount(level, held, minlength=128)
        spread = np.where(reference > 0, (total / np.maximum(filled, 1))[level], 0)
        p, q = (values / max(values.sum(), 1) + 1e-9 for values in (reference, spread))
        divergence = float(np.sum(p * np.log(p / q)))
        if divergence < best:
            best, chosen = divergence, edges[size]
    return max(histogram.least, -chosen), min(histogram.greatest, chosen)


def equalized(prepared: bytes) -> bytes:
    """Cross-layer equalisation of convolutions with only a Relu between them, depthwise ones included.

    Nagel et al. 2019, section 4.1. A Clip at 6 would clip the rescaled channels elsewhere, so it is passed over.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(prepared)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for _ in range(2):
        for first in model.graph.node:
            following = readers.get(first.output[0], [])
            if len(following) == 1 and following[0].op_type == "Relu":
                following = readers.get(following[0].output[0], [])
            if first.op_type != "Conv" or len(following) != 1 or following[0].op_type != "Conv":
                continue
            a, b = (numpy_helper.to_array(tensors[node.input[1]]).copy() for node in (first, following[0]))
            depthwise = b.shape[1] == 1
            if not depthwise and b.shape[1] != a.shape[0]:
                continue
            before = np.abs(a).reshape(len(a), -1).max(axis=1)
            after = np.abs(b if depthwise else b.swapaxes(0, 1)).reshape(len(a), -1).max(axis=1)
            scale = np.where((before > 0) & (after > 0), np.sqrt(before / np.maximum(after, 1e-12)), 1)
            scale = np.clip(scale, 1e-3, 1e3).astype(np.float32)
            a /= scale[:, None, None, None]
            b *= scale[:, None, None, None] if depthwise else scale[None, :, None, None]
            changed = {first.input[1]: a, following[0].input[1]: b}
            if len(first.input) > 2:
                changed[first.input[2]] = numpy_helper.to_array(tensors[first.input[2]]) / scale
            for name, values in changed.items():
                tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    return bytes(model.SerializeToString())


def weights_only(graph: bytes, bits: int) -> bytes:
    """Products with weights of so many bits, blocks of 32 of them with a scale (MatMulNBits); all else in fp32."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load_from_string(graph), bits=bits, block_size=32, accuracy_level=4)
    quantizer.process()
    return bytes(quantizer.model.model.SerializeToString())


def compiled(source: Any) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each way to quantize, by name."""
    from export import quantize, ranges
    from export.correction import corrected

    spec, rows = source.spec, source.calibration
    start = quantize.prepared(source.graph)
    statistics = ranges.observe(start, spec, rows)
    known = {method: ranges.ranges(statistics, method) for method in ("minmax", "percentile")}
    known["entropy"] = {name: entropy(one) for name, one in statistics.items()}
    known["mse"] = {name: mse(one) for name, one in statistics.items()}

    def static(method: str, **options: bool) -> bytes:
        return quantize.int8_static(start, spec, known[method], **options)

    def equalised() -> bytes:
        other = equalized(start)
        return quantize.int8_static(other, spec, ranges.ranges(ranges.observe(other, spec, rows), "minmax"))

    yield "dynamic", lambda: quantize.int8_dynamic(source.graph)
    for method in known:
        yield method, lambda method=method: static(method)
    yield "minmax, per tensor", lambda: static("minmax", per_channel=False)
    yield "minmax, signed", lambda: static("minmax", signed=True)
    for method in ("minmax", "percentile"):
        yield f"{method}, corrected", lambda method=method: corrected(static(method), start, spec, rows)
    if "Conv" in str([node.op_type for node in onnx_nodes(start)]):
        yield "minmax, equalised", equalised
    else:
        yield "weights in 8 bits", lambda: weights_only(source.graph, 8)
        yield "weights in 4 bits", lambda: weights_only(source.graph, 4)


def onnx_nodes(graph: bytes) -> Any:
    import onnx

    return onnx.load_from_string(graph).graph.node


def measure(checkpoint: Path, most: int) -> dict[str, dict[str, float]]:
    """Every way on one checkpoint; accuracy and divergence on at most so many examples of the selection split."""
    import numpy as np

    from bundle import preprocess
    from bundle.errors import ModelError
    from bundle.model import predict_logits
    from bundle.session import Session
    from export import quantize, timing
    from export.config import ExportConfig
    from export.source import open_source

    source = open_source(
        ExportConfig(checkpoint, out=checkpoint.with_name("bundle"), cache=False, calibration=CALIBRATION)
    )
    selection, (name,) = source.selection, ("logits",)
    rows = [selection.rows[i] for i in range(min(most, len(selection)))]
    truth = np.asarray(selection.targets[0].values)[: len(rows)].astype(int)
    feeds = [preprocess.collate([row], source.spec) for row in rows[:32]]
    reference = Session(source.graph, device="cpu", threads=1)

    def log_probabilities(session: Session) -> np.ndarray:
        logits = predict_logits(session, source.spec, rows, batch_invariant=False)[name].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    expected = log_probabilities(reference)
    found: dict[str, dict[str, float]] = {}
    for way, make in compiled(source):
        try:
            graph = make()
            session = Session(graph, device="cpu", threads=1)
            got = log_probabilities(session)
        except ModelError as error:
            print(f"{way}: {error}", file=sys.stderr)
            continue
        right, wrong = ((one.argmax(axis=1) == truth).mean() for one in (expected, got))
        found[way] = {
            "drop": 100 * float(right - wrong),
            "KL": 1000 * float((np.exp(expected) * (expected - got)).sum(axis=1).mean()),
            "leftovers": quantize.leftovers(graph),
            "ratio": timing.interleaved(session, reference, feeds).ratio,
            "MB": len(graph) / 1e6,
        }
        print(f"{way}: {found[way]}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=800, help="examples, of which 40%% train (default 800)")
    parser.add_argument("--most", type=int, default=360, help="examples of the selection split (default 360)")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    for model in options.models:
        found = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                found.append(measure(train_checkpoint(model, Path(folder), options.rows, seed), options.most))
        show(model, found)


def show(model: str, found: list[dict[str, dict[str, float]]]) -> None:
    print(f"\n| {model} | drop, points | KL, millinats | leftovers | ratio | MB |\n|---|---|---|---|---|---|")
    for way in found[0]:
        runs = [run[way] for run in found if way in run]
        each = [
            " ".join(f"{run[key]:+.2f}" if key == "drop" else f"{run[key]:.1f}" for run in runs)
            for key in ("drop", "KL")
        ]
        last = [
            f"{mean(run[key] for run in runs):.{digits}f}"
            for key, digits in (("leftovers", 0), ("ratio", 2), ("MB", 1))
        ]
        print(f"| {way} | {' | '.join([*each, *last])} |")


if __name__ == "__main__":
    main()
