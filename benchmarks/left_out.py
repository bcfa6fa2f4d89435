"""What edgeward does not offer, measured: python benchmarks/left_out.py [--seeds 3] [--rows 1000] [--json FILE]

Gradual unfreezing and L2-SP against lp-ft (MiniLM on tweets), and the features of K augmented views against those of
the examples themselves (EfficientNet-Lite0 on digits), all by the product's own parts. Accuracy of the selection and
gate splits together, mean ± standard deviation over seeds of the splits and of everything else.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.digits import digits
from examples.steps import minilm
from examples.tweets import tweets
from finetune import evaluate
from finetune.augment import augmented
from finetune.blocks import blocks
from finetune.features import encode_rows
from finetune.job import Job
from finetune.loop import Examples, fit
from finetune.objective import Objective, make_objective
from finetune.probe import fit_head
from finetune.strategies import adapt, make_recipe
from finetune.train import TrainConfig, prepare

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 3
L2_SP = (1e-2, 1.0)  # strengths; those of Li et al. 2018, arXiv 1802.01483, end at 1e-1
VIEWS = 4


@dataclass(frozen=True)
class TowardStart(Objective):
    """The loss plus strength / 2 · |w - w₀|² of the backbone: L2-SP."""

    backbone: torch.nn.Module | None = None
    strength: float = 0.0

    def loss(self, *arguments: Any) -> torch.Tensor:
        start = self.__dict__.setdefault("start", [p.detach().clone() for p in self.backbone.parameters()])
        pairs = zip(self.backbone.parameters(), start, strict=True)
        away = sum((now - then).square().sum() for now, then in pairs)
        return super().loss(*arguments) + self.strength / 2 * away


def lp_ft(job: Job) -> None:
    adapt(job, "lp-ft")


def l2_sp(strength: float) -> Callable[[Job], None]:
    def run(job: Job) -> None:
        adapt(job, "probe")
        plain = objective(job)
        terms = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
        train_all(job, TowardStart(**terms, backbone=job.network.backbone, strength=strength))

    return run


def gradual(job: Job) -> None:
    """The head by a probe, one epoch with half of the blocks, the others with all: as in ULMFiT, arXiv 1801.06146."""
    adapt(job, "probe")
    groups = blocks(job.network)
    for opened, epochs in ((len(groups) // 2, 1), (len(groups), EPOCHS - 1)):
        names = [name for group in groups[-opened:] for name in group]
        train_all(job, objective(job), names, epochs=epochs)


def objective(job: Job) -> Objective:
    return make_objective(job.config, job.tasks, job.dataset.weights, job.targets(job.indices("train")))


def train_all(job: Job, what: Objective, names: list[str] | None = None, epochs: int = EPOCHS) -> None:
    train, validation = (
        Examples(encode_rows(job.pretrained, job.dataset, job.indices(split)), job.targets(job.indices(split)))
        for split in ("train", "validation")
    )
    recipe = make_recipe(job, "full")
    recipe = replace(recipe, epochs=epochs, learning_rate=0.4 * recipe.learning_rate)
    everything = [name for name, _ in job.network.named_parameters()]
    fit(job.network, train, validation, job.pretrained.input, what, recipe, job.device, trainable=names or everything)


def probe(job: Job) -> None:
    adapt(job, "probe")


def views(job: Job) -> None:
    """A head on the features of each training image and of VIEWS - 1 cropped and recoloured ones."""
    train, validation = job.indices("train"), job.indices("validation")
    spec = job.pretrained.input
    rows = [encode_rows(job.pretrained, job.dataset, train)]
    rows += [augmented(job.dataset, train, spec, ("crop", "color"), job.config.seed, k) for k in range(VIEWS - 1)]
    seen = np.concatenate([evaluate.features(job.network, each, spec) for each in rows])
    held_out = evaluate.features(job.network, encode_rows(job.pretrained, job.dataset, validation), spec)
    targets = job.targets(np.tile(train, VIEWS))
    head = fit_head(seen, targets, held_out, job.targets(validation), job.tasks)
    with torch.no_grad():
        job.network.head.weight.copy_(torch.from_numpy(head.weight))
        job.network.head.bias.copy_(torch.from_numpy(head.bias))


def accuracy(job: Job) -> float:
    held_out = np.concatenate([job.indices("selection"), job.indices("gate")])
    logits = evaluate.logits(job.network, encode_rows(job.pretrained, job.dataset, held_out), job.pretrained.input)
    return evaluate.score(job.tasks, logits, job.targets(held_out))["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="tweets, and digits, of each run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    work = Path(tempfile.mkdtemp(prefix="edgeward-left-out-"))
    table = work / "tweets.jsonl"
    lines = [json.dumps({"text": text, "label": label}) for text, label in tweets()[:: len(tweets()) // options.rows]]
    table.write_text("\n".join(lines))
    for number, (drawn, label) in enumerate(list(zip(*digits(), strict=True))[: options.rows]):
        (work / "digits" / str(label)).mkdir(parents=True, exist_ok=True)
        drawn.save(work / "digits" / str(label) / f"{number:04}.png")
    text = TrainConfig(f"transformers:{minilm()}", str(table), out=work / "none", max_length=48, epochs=EPOCHS)
    factory = f"python:{ROOT / 'examples' / 'efficientnet_lite0.py'}:efficientnet_lite0"
    image = TrainConfig(factory, str(work / "digits"), out=work / "none")
    rivals: list[tuple[str, TrainConfig, Callable[[Job], None]]] = [
        ("lp-ft", text, lp_ft),
        *((f"lp-ft + L2-SP {strength:g}", text, l2_sp(strength)) for strength in L2_SP),
        ("gradual unfreezing", text, gradual),
        ("probe", image, probe),
        (f"probe of {VIEWS} views", image, views),
    ]
    results = []
    for name, config, method in rivals:
        found, seconds = [], []
        for seed in range(options.seeds):
            out = work / f"{len(results)}-{seed}"  # no checkpoint is written
            job = prepare(replace(config, out=out, seed=seed, split=(0.4, 0.1, 0.25, 0.25)))
            start = time.perf_counter()
            method(job)
            seconds.append(time.perf_counter() - start)
            found.append(accuracy(job))
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        results.append({"name": name, "accuracy": found, "seconds": seconds})
        print(
            f"{name:<22} {statistics.mean(found):.4f} ± {spread:.4f}   {statistics.median(seconds):6.1f} s", flush=True
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
