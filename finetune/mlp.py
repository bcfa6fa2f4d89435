"""`mlp`: dense layers on feature vectors."""

import numpy as np
from torch import nn

from bundle.manifest import VectorInput
from finetune.config import TrainConfig
from finetune.data import Dataset
from finetune.model import MlpModel, Standardize, dense, moments
from finetune.pretrained import Pretrained

COLUMN = "features"  # of vectors that were several columns of a table


def open_model(config: TrainConfig, dataset: Dataset, train: np.ndarray) -> Pretrained:
    """New layers, behind a standardisation by the train split.

    Args:
        config: has the widths.
        dataset: has the vectors, finite float32 as raw bytes.
        train: int64 positions of the train split.
    """
    vectors = np.stack([np.frombuffer(dataset.raw(int(position)), dtype="<f4") for position in train])
    mean, std = moments(vectors)
    size = vectors.shape[1]
    spec = MlpModel(size=size, widths=config.widths)
    column = dataset.input_columns[0] if len(dataset.input_columns) == 1 else COLUMN
    names = tuple(dataset.feature_names)
    backbone = _backbone(spec, mean, std)
    return Pretrained(spec, VectorInput(column=column, size=size, names=names), backbone, _width(spec), {})


def rebuild(spec: MlpModel) -> tuple[nn.Module, int]:
    """The same layers with fresh weights, and the number of their features."""
    return _backbone(spec, np.zeros(spec.size), np.ones(spec.size)), _width(spec)


def _backbone(spec: MlpModel, mean: np.ndarray, std: np.ndarray) -> nn.Module:
    return nn.Sequential(Standardize(mean, std), *dense(spec.size, spec.widths))


def _width(spec: MlpModel) -> int:
    return (spec.size, *spec.widths)[-1]
