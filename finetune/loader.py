"""Raw examples -> tensors -> batches, a few batches ahead of the network."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from bundle.errors import BadInput, DataError
from bundle.host import cpu_count
from bundle.manifest import Input
from bundle.preprocess import Encode, collate
from finetune.data import Dataset


@dataclass(frozen=True)
class EncodedRows(Sequence[np.ndarray]):
    """Tensors of some of a dataset's examples, encoded whenever they are asked for, so that images take no memory."""

    dataset: Dataset
    indices: np.ndarray  # int64, positions in the dataset
    encode: Encode

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "EncodedRows": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | EncodedRows":
        if isinstance(index, slice):
            return EncodedRows(self.dataset, self.indices[index], self.encode)
        position = int(self.indices[index])
        try:
            return self.encode(self.dataset.raw(position))
        except (BadInput, OSError) as error:
            raise DataError(f"{self.dataset.names[position]} of {self.dataset.location}: {error}") from error


def batches(
    rows: Sequence[np.ndarray], plan: Sequence[np.ndarray], spec: Input, device: torch.device
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Collated batches in the order of the plan, made by threads while the network works.

    Args:
        rows: tensors without batch axis.
        plan: for each batch the int64 positions of its rows.
        spec: how to collate.
        device: where the tensors go.

    Yields:
        The positions, and the graph's inputs by name.
    """
    workers = cpu_count()
    cuda = device.type == "cuda"

    def make(positions: np.ndarray) -> dict[str, torch.Tensor]:
        arrays = collate([rows[int(i)] for i in positions], spec)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if cuda else tensors

    pool = ThreadPoolExecutor(workers)
    try:
        ahead = deque((positions, pool.submit(make, positions)) for positions in plan[: workers + 1])
        rest = iter(plan[workers + 1 :])
        while ahead:
            positions, future = ahead.popleft()
            for following in rest:
                ahead.append((following, pool.submit(make, following)))
                break
            yield positions, {name: value.to(device, non_blocking=cuda) for name, value in future.result().items()}
    finally:
        pool.shutdown(cancel_futures=True)
