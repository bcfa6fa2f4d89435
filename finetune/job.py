"""Everything that a strategy works on."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from bundle.manifest import Task
from bundle.preprocess import Encode
from finetune.config import Strategy, TrainConfig
from finetune.data import Dataset
from finetune.model import Network
from finetune.parallel import World
from finetune.pretrained import Pretrained
from finetune.splits import SPLIT_NAMES, SplitName, Splits
from finetune.target import Target


@dataclass(frozen=True)
class Job:
    """A network that is ready to be trained, and what on.

    Attributes:
        fingerprint: hex digest of all that the result depends on.
        encode: one raw example -> its tensor without batch axis; raises BadInput.
    """

    config: TrainConfig
    strategy: Strategy
    world: World
    device: torch.device
    pretrained: Pretrained
    dataset: Dataset
    splits: Splits
    tasks: tuple[Task, ...]
    network: Network
    encode: Encode
    fingerprint: str

    def indices(self, split: SplitName) -> np.ndarray:
        """Positions int64 (N,) of a split's examples in the dataset."""
        return self._positions[split]

    @cached_property
    def _positions(self) -> dict[SplitName, np.ndarray]:
        return {split: self.splits.indices(self.dataset, split) for split in SPLIT_NAMES}

    def targets(self, indices: np.ndarray) -> tuple[Target, ...]:
        """The label columns of some examples."""
        return tuple(target.take(indices) for target in self.dataset.targets)
