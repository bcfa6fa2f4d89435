"""A head that was fitted on what the int8 backbone gives, instead of on what the fp32 one gave."""

from collections.abc import Sequence

import numpy as np

from bundle.log import log
from bundle.manifest import Input
from bundle.model import predict_logits
from bundle.session import Session
from export import graph, quantize
from finetune.checkpoint import Checkpoint
from finetune.data import Dataset
from finetune.loader import EncodedRows
from finetune.probe import fit_head
from finetune.splits import SplitName


def int8_static_refit(checkpoint: Checkpoint, dataset: Dataset, calibration: Sequence[np.ndarray]) -> bytes:
    """The backbone in static int8 with a new head in fp32, fitted to it.

    Rounding moves the features, most of them by a little in one direction; a head that has seen it takes it into
    account. It is fitted as the probe's is: on the train split, its penalty chosen on the validation split.

    Args:
        checkpoint: whose backbone is compiled; its own head is not looked at.
        dataset: that it was split from.
        calibration: preprocessed training examples that set the ranges.
    """
    spec, tasks = checkpoint.spec.input, checkpoint.spec.tasks
    backbone = graph.to_onnx(checkpoint.network, spec, (), calibration, features=True)
    compiled = quantize.int8_minmax(backbone, spec, calibration)
    session = Session(compiled, device="cpu")
    known, held_out = (_split(checkpoint, dataset, split) for split in ("train", "validation"))
    log.info("refitting the head", examples=len(known), validation=len(held_out))
    targets, held_out_targets = (
        tuple(target.take(rows.indices) for target in dataset.targets) for rows in (known, held_out)
    )
    head = fit_head(
        _features(session, spec, known), targets, _features(session, spec, held_out), held_out_targets, tasks
    )
    return graph.with_head(compiled, head.weight, head.bias, tasks)


def _split(checkpoint: Checkpoint, dataset: Dataset, split: SplitName) -> EncodedRows:
    return EncodedRows(dataset, checkpoint.splits.indices(dataset, split), checkpoint.encode)


def _features(session: Session, spec: Input, rows: Sequence[np.ndarray]) -> np.ndarray:
    """What the int8 backbone gives, float32 (N, D); in batches, as the last bits do not matter to a fit."""
    return predict_logits(session, spec, rows, batch_invariant=True)[graph.FEATURES]
