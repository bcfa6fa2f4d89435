"""What the processes of tests/test_finetune_parallel.py do: python -m torch.distributed.run … THIS FOLDER."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from finetune import evaluate
from finetune.loop import fit
from finetune.parallel import World, sharded_logits, world
from finetune.resume import Progress
from tests.finetune_loops import (
    CPU,
    IMAGE,
    RECIPE,
    VECTOR,
    image_network,
    multiclass,
    objective,
    vector_network,
    vectors,
    write_result,
)

EXACT = replace(RECIPE, epochs=2, optimizer="sgd", learning_rate=0.1, batch_size=5, accumulate=2)
RANDOM = replace(RECIPE, epochs=4, ema=0.9, mixup=0.3, batch_size=5, save_steps=3)


class Stop(Exception):
    pass


def train_exactly(out, ours):
    """Neither dropout nor running means, an odd number of examples, a parameter that nothing depends on."""
    network = vector_network()
    network.backbone.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    examples = vectors(31)
    places = {row.tobytes(): place for place, row in enumerate(examples.rows)}
    seen = []  # by the network: threads read the rows ahead of it, in no order

    def see(backbone, inputs):
        if backbone.training:
            seen.extend(places[row.numpy().tobytes()] for row in inputs[0].detach())

    network.backbone.register_forward_pre_hook(see)
    history = fit(
        network, examples, vectors(7, seed=1), VECTOR, objective(*examples.targets), EXACT, CPU,
        trainable=[name for name, _ in network.named_parameters()], world=ours,
    )  # fmt: skip
    write_result(f"{out}.{ours.rank}", network, history)
    Path(f"{out}.{ours.rank}.seen").write_text(json.dumps(seen))


def train_randomly(out, ours, progress=None, stop_in=None):
    """Dropout, running means, mixup and a running average; raises Stop when it comes to an epoch."""
    from finetune.loop import Examples

    network = image_network()
    chance = np.random.default_rng(0)
    labels = chance.integers(2, size=31)
    rows = [(chance.integers(0, 160, (8, 8, 3)) + 90 * label).astype(np.uint8) for label in labels]
    train = Examples(rows, (multiclass(labels, 2),))

    def rows_of_epoch(epoch):
        if epoch == stop_in:
            raise Stop
        return rows

    history = fit(
        network, train, train, IMAGE, objective(*train.targets), RANDOM, CPU,
        trainable=[name for name, _ in network.named_parameters()], world=ours, rows_of_epoch=rows_of_epoch,
        progress=None if progress is None else Progress(progress, "tiny", RANDOM.save_steps),
    )  # fmt: skip
    write_result(f"{out}.{ours.rank}", network, history)


def measure(out, ours):
    """Logits of as many examples as asked for, by all processes and by one."""
    network = vector_network()
    for count in (1, 7, 8):
        rows = vectors(count).rows
        found = sharded_logits(ours, network, rows, VECTOR, 2, CPU)
        np.save(f"{out}.{count}.{ours.rank}.npy", found)
        np.save(f"{out}.{count}.alone.npy", evaluate.logits(network, rows, VECTOR, 2, CPU))


def main(folder):
    torch.set_num_threads(1)
    with world() as ours:
        name = folder / f"of{ours.size}"
        train_exactly(f"{name}-exact", ours)
        if ours.size == 1:
            return
        train_exactly(f"{name}-again", ours)
        train_randomly(f"{name}-whole", ours)
        try:
            train_randomly(f"{name}-stopped", ours, folder / "progress", stop_in=2)
        except Stop:
            train_randomly(f"{name}-resumed", ours, folder / "progress")
        measure(f"{name}-logits", ours)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    assert World() == World(0, 1)
