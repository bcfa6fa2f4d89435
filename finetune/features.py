"""The frozen backbone's features of a dataset's examples, computed once and kept."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from bundle.manifest import TextInput, to_json
from bundle.preprocess import encoder
from finetune import evaluate
from finetune.cache import cached
from finetune.checkpoint import library_versions
from finetune.data import Dataset
from finetune.loader import EncodedRows
from finetune.model import Network
from finetune.pretrained import Pretrained


def encode_rows(pretrained: Pretrained, dataset: Dataset, indices: np.ndarray) -> Sequence[np.ndarray]:
    """Preprocessed examples: texts in memory, images encoded whenever they are asked for."""
    rows = EncodedRows(dataset, indices, encoder(pretrained.input, pretrained.files.__getitem__))
    return list(rows) if isinstance(pretrained.input, TextInput) else rows  # token ids are small, pixels are not


def backbone_features(
    pretrained: Pretrained,
    network: Network,
    dataset: Dataset,
    indices: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    cache: bool,
) -> np.ndarray:
    """What the head sees of some examples, float32 (N, D), without dropout and with the running means of training.

    Args:
        pretrained: says how to preprocess.
        network: of `pretrained`.
        dataset: has the examples.
        indices: int64 (N,), positions in the dataset.
        batch_size: examples at a time.
        device: to compute on.
        cache: take them from the cache, and keep them there.
    """

    def compute() -> np.ndarray:
        rows = encode_rows(pretrained, dataset, indices)
        return evaluate.features(network, rows, pretrained.input, batch_size, device)

    if not cache:
        return compute()
    return cached(_key(pretrained, network, [dataset.hashes[i] for i in indices], device), compute)


def _key(pretrained: Pretrained, network: Network, hashes: list[str], device: torch.device) -> str:
    """Hex digest of the backbone, the preprocessing, the libraries and the examples in their order."""
    digest = hashlib.sha256()
    for part in (pretrained.spec, pretrained.input):
        digest.update(to_json(part))
    for name, data in sorted(pretrained.files.items()):
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    digest.update(f"{library_versions()} {device.type}\n{network.backbone}\n".encode())
    for name, tensor in network.backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update("\n".join(hashes).encode())
    return digest.hexdigest()
