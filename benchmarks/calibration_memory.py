"""Memory of calibration: python benchmarks/calibration_memory.py [--examples 100 1000 10000] [--peer 20 100]

Peak resident memory of one process that finds the histograms of a ResNet18's activations (64 × 64 pixels, random
weights and images, which are made as they are asked for), ours and by onnxruntime.quantization's PercentileCalibrater,
less what the process had before. Ours must not grow with the number of examples. Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIDE = 64  # pixels


class Images(Sequence[Any]):
    """So many random images, made when they are asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        import numpy as np

        if not 0 <= i < self._count:
            raise IndexError(i)
        return np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def make(folder: Path) -> None:
    """Write the prepared graph."""
    import torch
    from torchvision.models import resnet18

    from bundle.manifest import Multiclass
    from export import fold, graph, quantize
    from finetune.model import ImageNetwork

    backbone = resnet18()
    backbone.fc = torch.nn.Identity()
    network = fold.folded(ImageNetwork(backbone, 512, 10, _spec()).eval())
    tasks = (Multiclass(name="kind", labels=tuple("abcdefghij")),)
    exported = graph.to_onnx(network, _spec(), tasks, [Images(8)[i] for i in range(8)])
    (folder / "prepared.onnx").write_bytes(quantize.prepared(exported))


def _spec() -> Any:
    from bundle.manifest import ImageInput

    half = (0.5, 0.5, 0.5)
    return ImageInput(
        column="image", height=SIDE, width=SIDE, resize=SIDE, interpolation="bilinear", mean=half, std=half
    )


def observe(folder: Path, who: str, count: int) -> None:
    """Find the ranges, and print the peak memory and the time it took."""
    from bundle import preprocess
    from export import ranges

    prepared = (folder / "prepared.onnx").read_bytes()
    ranges.observe(prepared, _spec(), Images(2))  # the libraries and the session's own memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before, start = _peak_mib(), time.perf_counter()
    if who == "edgeward":
        ranges.observe(prepared, _spec(), Images(count))
    else:
        from onnxruntime.quantization.calibrate import CalibrationDataReader, PercentileCalibrater

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            feeds = (preprocess.collate([image], _spec()) for image in Images(count))

            def get_next(self) -> Any:
                return next(self.feeds, None)

        peer = PercentileCalibrater(folder / "prepared.onnx", ["Conv", "Gemm"], str(folder / "augmented.onnx"))
        peer.augment_graph()
        peer.create_inference_session()
        peer.collect_data(Reader())
        peer.compute_data()
    print(json.dumps({"mib": _peak_mib() - before, "seconds": time.perf_counter() - start}))


def _peak_mib() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="*", default=[100, 1000, 10000])
    parser.add_argument("--peer", type=int, nargs="*", default=[20, 100], help="examples for onnxruntime's")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, who, count = options.one
        observe(Path(folder), who, int(count))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        print("| | examples | MiB beyond the session's own | s |\n|---|---|---|---|")
        for who, counts in (("edgeward", options.examples), ("onnxruntime", options.peer)):
            for count in counts:
                command = [sys.executable, __file__, "--one", folder, who, str(count)]
                told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
                print(f"| {who} | {count} | {told['mib']:.0f} | {told['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
