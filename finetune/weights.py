"""Which tensors of a network training changes, and which it must leave as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from finetune.recipe import Tensors


def freeze(network: nn.Module, trainable: Sequence[str]) -> None:
    """Let only the named parameters require gradients."""
    network.requires_grad_(False)
    for name in trainable:
        network.get_parameter(name).requires_grad_(True)


def set_modes(network: nn.Module) -> None:
    """Training mode for what is trained, eval mode for what is frozen, so that dropout and running means are, too.

    A module is frozen when none of its parameters requires gradients. One without parameters is as the module that it
    is in; but when it has buffers, and only a part of that module is trained, it is frozen.
    """
    _set_mode(network, network, training=False)


def _set_mode(module: nn.Module, parent: nn.Module, *, training: bool) -> None:
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained:
        training = any(trained)
    elif any(True for _ in module.buffers()):
        training = training and all(parameter.requires_grad for parameter in parent.parameters())
    module.training = training
    for child in module.children():
        _set_mode(child, module, training=training)


class Weights:
    """The tensors of a network that training changes: parameters, and the buffers of modules that are trained.

    Attributes:
        parameters: those that require gradients.
        average: a running average of them and of the running means of norms; empty when there is none.
    """

    def __init__(self, network: nn.Module, *, averaged: bool) -> None:
        """Take a network whose parameters require gradients or not, and set its modes."""
        set_modes(network)
        self._network = network
        self.parameters: Tensors = {name: each for name, each in network.named_parameters() if each.requires_grad}
        kept = network.state_dict().keys()
        trained = {path for path, module in network.named_modules() if module.training}
        buffers = (name for name, _ in network.named_buffers() if name in kept)
        self._buffer_names = [name for name in buffers if name.rpartition(".")[0] in trained]
        self._untouched: Tensors = {name: each.clone() for name, each in self.buffers().items()}
        self.average: Tensors = {}
        if averaged:
            self.average = {name: each.detach().clone() for name, each in self._averaged().items()}

    def buffers(self) -> Tensors:
        """The buffers that training may change."""
        return {name: self._network.get_buffer(name) for name in self._buffer_names}

    def changed(self) -> Tensors:
        """What differs from the network that was given: the trained parameters, and buffers that did change."""
        buffers = self.buffers().items()
        return self.parameters | {name: each for name, each in buffers if not torch.equal(each, self._untouched[name])}

    def load(self, tensors: Tensors) -> None:
        """Give the network what `changed` gave before."""
        current = self.parameters | self.buffers()
        with torch.no_grad():
            for name, tensor in (self._untouched | tensors).items():
                current[name].copy_(tensor)

    def update_average(self, step: int, decay: float) -> None:
        """Let the average follow, in the first steps faster than its decay, so that it forgets where it began."""
        if self.average:
            followed = list(self._averaged().values())
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), followed, 1 - min(decay, (1 + step) / (10 + step)))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the network has the average, where there is one."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        current = self._averaged() if self.average else {}
        for name, tensor in self.average.items():
            current[name].data, tensor.data = tensor.data, current[name].data

    def _averaged(self) -> Tensors:
        means = {name: each for name, each in self.buffers().items() if name.endswith(("running_mean", "running_var"))}
        return self.parameters | means
