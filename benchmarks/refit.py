"""What a new head recovers of static int8: python benchmarks/refit.py tweets|digits [--seeds 3] [--rows N]

A probe on MiniLM (tweets) or on EfficientNet-Lite0 (digits), exported with --refit-head. What static int8 loses of
PyTorch's accuracy on the selection split, with the head that was fitted in PyTorch and with the one that was fitted
again on the int8 backbone's features, which come from train and validation. A seed decides the splits.
"""

import argparse
import os
import random
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]


def job(task: str, folder: Path, rows: int) -> tuple[str, Path]:
    """Write the data; the model and where the data is."""
    from examples.bert import write_table
    from examples.digits import digits
    from examples.steps import minilm

    if task == "tweets":
        write_table(folder / "tweets.csv", rows, pair=False)
        return f"transformers:{minilm()}", folder / "tweets.csv"
    for number, (image, label) in enumerate(random.Random(0).sample(list(zip(*digits(), strict=True)), rows)):
        (folder / "digits" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(folder / "digits" / str(label) / f"{number:04}.png")
    return f"python:{ROOT / 'examples' / 'efficientnet_lite0.py'}:efficientnet_lite0", folder / "digits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["tweets", "digits"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1700)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    from export.build import ExportConfig, export_checkpoint
    from finetune.train import TrainConfig, train

    drops: dict[str, list[float]] = {"int8-static": [], "int8-static-refit": []}
    with tempfile.TemporaryDirectory() as place:
        model, data = job(options.task, Path(place), options.rows)
        for seed in range(options.seeds):
            out = Path(place) / f"checkpoint-{seed}"
            train(TrainConfig(model, str(data), out=out, seed=seed, split=(0.4, 0.1, 0.45, 0.05)))
            bundle = Path(place) / f"bundle-{seed}"
            report = export_checkpoint(ExportConfig(out, out=bundle, refit_head=True)).report
            for one in report.candidates:
                if one.name in drops:
                    drops[one.name].append(100 * one.selection_drop["accuracy"])
    for name, points in drops.items():
        each = ", ".join(f"{point:+.2f}" for point in points)
        print(f"{name:<18} lost {mean(points):+.2f} points of accuracy ({each}) on {report.examples['selection']}")


if __name__ == "__main__":
    main()
