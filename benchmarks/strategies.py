"""Every strategy on the same data, with several seeds: python benchmarks/strategies.py tweets|digits [--seeds N]

A seed decides the splits, the first weights and the order of the examples; all strategies have the same seeds.
Accuracy is that on the gate split, mean ± standard deviation over the seeds, seconds are those of the training.

tweets  MiniLM, three moods.
digits  A ResNet18 that was first trained on the digits 0 to 4 of other images, at 32 × 32 pixels; all ten digits.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

STRATEGIES: dict[str, dict[str, Any]] = {
    "probe": {"strategy": "probe"},
    "last": {"strategy": "last"},
    "full": {"strategy": "full"},
    "lp-ft": {"strategy": "lp-ft"},
    "lora": {"strategy": "lora"},
    "auto": {"strategy": "auto"},
    "full, layer decay 0.8": {"strategy": "full", "layer_decay": 0.8},
    "full, EMA 0.99": {"strategy": "full", "ema": 0.99},
    "full, label smoothing 0.1": {"strategy": "full", "label_smoothing": 0.1},
}


def tweets_job(folder: Path, rows: int) -> dict[str, Any]:
    from examples.bert import write_table
    from examples.steps import minilm

    write_table(folder / "tweets.csv", rows, pair=False)
    return {"model": f"transformers:{minilm()}", "data": str(folder / "tweets.csv")}


def digits_job(folder: Path, rows: int) -> dict[str, Any]:
    from examples.digits import digits, enlarged
    from finetune.train import TrainConfig, train

    images, labels = digits()
    pictures = enlarged(images, 32)
    for number, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        if (number < 600 and label > 4) or number >= 600 + rows:
            continue
        place = folder / ("source" if number < 600 else "target") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number:04}.png")
    common = {"model": "torchvision:resnet18", "image_size": 32, "optimizer": "sgd", "learning_rate": 0.02}
    train(
        TrainConfig(
            **common, data=str(folder / "source"), out=folder / "start", weights="none", strategy="full", epochs=8
        )
    )
    return common | {"data": str(folder / "target"), "weights": str(folder / "start" / "weights.safetensors")}


def measure(job: dict[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """What each strategy reached with each seed; seed by seed, so that a slow hour slows all of them."""
    from benchmarks.scored import gate_score
    from bundle.errors import ModelError
    from finetune.train import TrainConfig, prepare, run

    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for name, settings in STRATEGIES.items():
            if options.only and name not in options.only:
                continue
            out = folder / f"{len(found)}-{seed}-{name.replace(' ', '-')}"
            config = TrainConfig(
                **job,
                **settings,
                out=out,
                seed=seed,
                epochs=options.epochs,
                split=(0.4, 0.1, 0.1, 0.4),
                threads=options.threads,
                cache=False,
            )
            try:
                prepared = prepare(config)
                start = time.perf_counter()
                run(prepared)
            except ModelError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            row = {"seconds": time.perf_counter() - start, **gate_score(out)}
            found.setdefault(name, []).append(row)
            print(f"{name}, seed {seed}: accuracy {row['accuracy']:.4f}, {row['seconds']:.0f} s", file=sys.stderr)
    return found


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else float('nan'):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["tweets", "digits"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000, help="examples, of which 40%% train (default 1000)")
    parser.add_argument("--epochs", type=int, help="of the loop; by default as many as suit the number of examples")
    parser.add_argument("--only", nargs="*", choices=STRATEGIES, help="some of the strategies")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true", help="every run as one JSON object")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryDirectory() as folder:
        job = (tweets_job if options.task == "tweets" else digits_job)(Path(folder), options.rows)
        found = measure(job, options, Path(folder))
    if options.json:
        print(json.dumps(found))
        return
    print(f"| {options.task}, {options.seeds} seeds | accuracy | macro F1 | seconds |\n|---|---|---|---|")
    for name, rows in found.items():
        scores = [spread([row[metric] for row in rows]) for metric in ("accuracy", "macro_f1")]
        print(f"| {name} | {' | '.join(scores)} | {mean(row['seconds'] for row in rows):.0f} |")


if __name__ == "__main__":
    main()
