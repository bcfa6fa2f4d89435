"""Hold a probe to scikit-learn: python examples/yardstick.py CHECKPOINT

StandardScaler and LogisticRegression on the same frozen features and splits, the penalty chosen by its score on the
same validation split; both are scored on the gate split. Exits with 1 when ours is below it, or below the majority.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from bundle.manifest import TextInput
from bundle.metrics import accuracy, macro_f1
from finetune.checkpoint import load_checkpoint
from finetune.data import load_dataset
from finetune.features import backbone_features
from finetune.pretrained import Pretrained
from finetune.probe import L2_GRID


def main() -> None:
    checkpoint = load_checkpoint(Path(sys.argv[1]))
    spec, splits = checkpoint.spec, checkpoint.splits
    dataset = load_dataset(splits.data, "text" if isinstance(spec.input, TextInput) else "image")
    labels = dataset.targets[0].values
    head = checkpoint.network.head
    frozen = Pretrained(spec.model, spec.input, checkpoint.network.backbone, head.in_features, checkpoint.files)

    def features(indices: np.ndarray) -> np.ndarray:
        return backbone_features(
            frozen, checkpoint.network, dataset, indices, batch_size=32, device=torch.device("cpu"), cache=True
        )

    train, validation, gate = (splits.indices(dataset, name) for name in ("train", "validation", "gate"))
    fitted = features(np.concatenate([train, validation]))  # as the probe asked for them: they are in the cache
    x, held_out, test = fitted[: len(train)], fitted[len(train) :], features(gate)
    y, y_held_out, truth = (labels[indices] for indices in (train, validation, gate))

    with threadpool_limits(1):  # its small products are slower on several threads
        models = [
            make_pipeline(StandardScaler(), LogisticRegression(C=1 / (l2 * len(y)), max_iter=1000)).fit(x, y)
            for l2 in L2_GRID[::2]
        ]
    best = max(models, key=lambda model: model.score(held_out, y_held_out))
    theirs = best.predict(test)
    with torch.inference_mode():
        ours = head(torch.from_numpy(test)).numpy().argmax(axis=1)
    majority = np.full_like(truth, np.bincount(y).argmax())
    for name, predicted in (("majority", majority), ("sklearn", theirs), ("edgeward", ours)):
        print(f"{name:<9} accuracy {accuracy(truth, predicted):.4f}  macro F1 {macro_f1(truth, predicted):.4f}")
    if accuracy(truth, ours) < max(accuracy(truth, theirs), accuracy(truth, majority)):
        raise SystemExit("edgeward is below the yardstick")


if __name__ == "__main__":
    main()
