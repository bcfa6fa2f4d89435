"""A probe on cached features and five epochs of a frozen network: python benchmarks/cached_probe.py [--rows N]

The job: a linear head on MiniLM for tweets. Sides: the probe with an empty cache; the probe again, its features in
the cache; the same head trained for five epochs, for which the frozen network computes its features anew in every
epoch.
"""

import argparse
import csv
import random
import shutil
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import turns
from examples.steps import minilm
from examples.tweets import tweets


def prepare(options: argparse.Namespace) -> None:
    rows = random.Random(0).sample(tweets(), options.rows)
    with (options.folder / "tweets.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def probe(options: argparse.Namespace, *, cached: bool) -> turns.Row:
    if not cached:
        shutil.rmtree(options.folder / "cache", ignore_errors=True)
    return _train(options, strategy="probe")


def frozen(options: argparse.Namespace) -> turns.Row:
    return _train(options, strategy="last", train_last=1, epochs=5, learning_rate=1e-3)


def _train(options: argparse.Namespace, **settings: object) -> turns.Row:
    from benchmarks.scored import train
    from finetune.config import TrainConfig

    with tempfile.TemporaryDirectory(dir=options.folder) as out:
        common = {"split": (0.6, 0.1, 0.1, 0.2), "seed": options.seed, "threads": options.threads, "device": "cpu"}
        data = str(options.folder / "tweets.csv")
        config = TrainConfig(f"transformers:{minilm()}", data, out=Path(out) / "checkpoint", **(common | settings))
        return train(config)


def main() -> None:
    parser = turns.parser(__doc__)
    parser.add_argument("--rows", type=int, default=2000, help="tweets (default 2000)")
    sides = {
        "probe": partial(probe, cached=False),
        "probe, cached": partial(probe, cached=True),
        "five frozen epochs": frozen,
    }
    turns.compare(parser.parse_args(), sides, prepare)


if __name__ == "__main__":
    main()
