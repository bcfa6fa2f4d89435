"""What the packed first convolution of export/stem.py saves: python benchmarks/stem.py

Networks with random weights in static int8, one image of noise at a time: the time of the first convolution with and
without it, by profiles of one thread; and the latency with it by that without, in turns A B B A, the middle one of
three pairs of sessions and the ends of their 95% bootstrap intervals, with one thread and with all.
"""

import argparse
import os
from typing import Any

SIDES = {"resnet18": (112, 224), "mobilenet_v3_small": (224,), "efficientnet_lite0": (224,)}
PAIRS = 3  # of sessions: two of one file differ for as long as they live


def network(name: str) -> tuple[Any, int]:
    """A network without its last layer, and the width of what it gives."""
    from torch import nn

    if name == "efficientnet_lite0":
        from efficientnet_lite_pytorch import EfficientNet

        whole = EfficientNet.from_name("efficientnet-lite0")
        width, whole._fc = whole._fc.in_features, nn.Identity()
        return whole, width
    import torchvision

    whole = getattr(torchvision.models, name)()
    if hasattr(whole, "fc"):
        width, whole.fc = whole.fc.in_features, nn.Identity()
    else:
        width, whole.classifier = whole.classifier[0].in_features, nn.Identity()
    return whole, width


def compiled(name: str, side: int) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """Static int8 with the packed convolution and without, and inputs."""
    import numpy as np
    import torch

    from bundle import preprocess
    from bundle.manifest import ImageInput, Multiclass
    from export import graph, quantize, ranges
    from finetune.model import ImageNetwork

    scale = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    spec = ImageInput(column="image", height=side, width=side, resize=side, interpolation="bilinear", **scale)
    rows = list(np.random.default_rng(0).integers(0, 256, (16, side, side, 3), dtype=np.uint8))
    torch.manual_seed(0)
    fp32 = graph.to_onnx(
        ImageNetwork(*network(name), 10, spec).eval(),
        spec,
        (Multiclass(name="label", labels=tuple("0123456789")),),
        rows,
    )
    found = []
    for packed in (True, False):
        start = quantize.prepared(fp32, packed=packed)
        known = ranges.ranges(ranges.observe(start, spec, rows), "minmax")
        found.append(quantize.int8_static(start, spec, known))
    return found[0], found[1], [preprocess.collate([row], spec) for row in rows]


def first_ms(graph: bytes, feeds: list[dict[str, Any]]) -> float:
    """How long the steps up to the first convolution take, in ms."""
    import onnx

    from bundle.session import node_times, optimized

    times, total = node_times(graph, feeds, threads=1), 0.0
    for node in onnx.load_from_string(optimized(graph)).graph.node:
        total += times.get(node.name, 0.0)
        if node.op_type == "QLinearConv":
            break
    return total


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    from bundle.host import cpu_count, cpu_name
    from bundle.session import Session
    from export import timing

    counts = sorted({1, cpu_count()})
    print(cpu_name())
    print(f"\n| | first steps, ms | {' | '.join(f'× without, {count} threads' for count in counts)} |")
    print("|---|---|" + "---|" * len(counts))
    for name, side in ((name, side) for name, sides in SIDES.items() for side in sides):
        packed, plain, feeds = compiled(name, side)
        cells = [f"{first_ms(plain, feeds):.2f} → {first_ms(packed, feeds):.2f}"]
        for threads in counts:
            pairs = [[Session(each, device="cpu", threads=threads) for each in (packed, plain)] for _ in range(PAIRS)]
            times = sorted((timing.interleaved(*pair, feeds) for pair in pairs), key=lambda one: one.ratio)
            lower, upper = min(one.ratio_lower for one in times), max(one.ratio_upper for one in times)
            cells.append(f"{times[PAIRS // 2].ratio:.2f} ({lower:.2f} to {upper:.2f})")
        print(f"| {name}, {side} × {side} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
