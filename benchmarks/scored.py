"""What the sides of a benchmark have in common: a training of ours, and a checkpoint's score on its gate split."""

import time
from pathlib import Path

import torch

from finetune import evaluate
from finetune.checkpoint import load_checkpoint
from finetune.data import load_dataset
from finetune.loader import EncodedRows
from finetune.pretrained import modality
from finetune.train import TrainConfig, prepare, run


def train(config: TrainConfig) -> dict[str, float]:
    """Seconds from a loaded network and raw examples to the last weights, and then to the checkpoint with its report.

    Besides, the accuracy on the gate split.
    """
    job = prepare(config)
    start = time.perf_counter()
    trained = run(job).seconds
    written = time.perf_counter() - start
    return {"seconds": trained, "written s": written, "accuracy": gate_score(config.out)["accuracy"]}


def gate_score(path: Path) -> dict[str, float]:
    """The scores of a checkpoint on its gate split."""
    checkpoint = load_checkpoint(path)
    splits = checkpoint.splits
    columns = splits.label_columns or ("label",)
    dataset = load_dataset(
        splits.data, modality(f"checkpoint:{path}"), input_column=splits.input_columns, label_column=columns
    )
    gate = splits.indices(dataset, "gate")
    rows = EncodedRows(dataset, gate, checkpoint.encode)
    with torch.inference_mode():
        logits = evaluate.logits(checkpoint.network, rows, checkpoint.spec.input)
    return evaluate.score(checkpoint.spec.tasks, logits, [target.take(gate) for target in dataset.targets])
