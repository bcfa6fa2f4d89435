"""Training by several processes that torchrun started: who does what, and how they agree."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bundle.manifest import Input
from finetune import evaluate
from finetune.model import Network


@dataclass(frozen=True)
class World:
    """Which of how many processes this is. The first one, rank 0, is the one that writes."""

    rank: int = 0
    size: int = 1


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that torchrun started together with this one; without torchrun this one is alone.

    Tensors on the CPU travel by gloo, those on GPUs by NCCL; between the processes of one machine by loopback only.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size) and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield World(distributed.get_rank(), size)
    distributed.destroy_process_group()  # not after an error: the others are still at work, and torchrun ends them


def distribute(world: World, network: Network, inputs: Mapping[str, Tensor]) -> nn.Module:
    """The network, such that every backward pass adds up the gradients of all processes and divides by their number.

    Parameters that the logits do not depend on are frozen. Buffers are each process's own; see follow.

    Args:
        world: if it is one process, the network is returned as it is.
        network: on its device, the same in every process; its trainable parameters require gradients.
        inputs: the graph's inputs for an example or more.
    """
    if world.size == 1:
        return network
    network.eval()  # what follows must not leave a trace
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(network(*inputs.values()).sum(), trained, allow_unused=True)
    for parameter, gradient in zip(trained, found, strict=True):
        parameter.requires_grad_(gradient is not None)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.9 has no other name for it yet
        parallel = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    # The first backward pass decides in which order gradients are added up from then on. As it is done here, a training
    # that was resumed adds them up as one that was not.
    parallel(*inputs.values()).sum().backward()
    network.zero_grad(set_to_none=True)
    return parallel


def follow(world: World, tensors: Iterable[Tensor]) -> None:
    """Give every process the values of the first one."""
    if world.size > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def gathered(world: World, number: float) -> list[float]:
    """The float64 number of each process, by rank."""
    if world.size == 1:
        return [number]
    numbers = torch.zeros(world.size, dtype=torch.float64)
    numbers[world.rank] = number
    distributed.all_reduce(numbers)
    found: list[float] = numbers.tolist()
    return found


def sharded_logits(
    world: World, network: Network, rows: Sequence[np.ndarray], spec: Input, batch_size: int, device: torch.device
) -> np.ndarray:
    """Logits float32 (N, ΣC) as evaluate.logits gives them, each process computing its share, all of them returned."""
    if world.size == 1:
        return evaluate.logits(network, rows, spec, batch_size, device)
    whole = np.zeros((len(rows), network.head.out_features), dtype=np.float32)
    own = rows[world.rank :: world.size]
    if len(own):
        whole[world.rank :: world.size] = evaluate.logits(network, own, spec, batch_size, device)
    distributed.all_reduce(torch.from_numpy(whole))  # the others' rows are zeros
    return whole
