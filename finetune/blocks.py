"""The blocks of a network, from its input to its head: what "the last layers" are."""

import re

from torch import nn

from bundle.errors import ModelError
from finetune.model import Network

Block = list[str]  # names of parameters


def blocks(network: Network) -> list[Block]:
    """The network's parameters by block, first to last; the last block is the head.

    The children of the backbone's outermost Sequential and ModuleList modules are blocks. What comes before them is a
    block, too (embeddings, a stem); what comes after them belongs to the one before it, and so do children that are
    nothing but norms and scales. A backbone without such modules is one block.
    """
    shapes = {name: parameter.ndim for name, parameter in network.named_parameters()}
    found: list[Block] = []
    for names, in_stack in _groups(network.backbone, "backbone."):
        if found and (not in_stack or all(shapes[name] <= 1 for name in names)):
            found[-1] += names
        else:
            found.append(list(names))
    return [*found, [name for name in shapes if not name.startswith("backbone.")]]


def _groups(module: nn.Module, prefix: str) -> list[tuple[Block, bool]]:
    """Names of parameters that belong together, in order, and whether they are those of a stack's child."""
    own = [prefix + name for name, _ in module.named_parameters(recurse=False)]
    groups = [(own, False)] if own else []
    for name, child in module.named_children():
        below = f"{prefix}{name}."
        if not _is_stack(module) and any(_is_stack(each) for each in child.modules()):
            groups += _groups(child, below)
        elif names := [below + each for each, _ in child.named_parameters()]:
            groups.append((names, _is_stack(module)))
    return groups


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def last_blocks(network: Network, count: int) -> list[str]:
    """Names of the parameters of the last blocks, the head being the first that counts.

    Raises:
        ModelError: the network has fewer blocks.
    """
    found = blocks(network)
    if not 1 <= count <= len(found):
        raise ModelError(f"the last {count} blocks cannot be trained: the network has {len(found)}, with the head.")
    return [name for block in found[-count:] for name in block]


def matching(network: Network, pattern: str) -> list[str]:
    """Names of the parameters in which a regular expression is found anywhere, and of the head's.

    Raises:
        ModelError: it is no regular expression, or matches no parameter of the backbone.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ModelError(f"{pattern!r} is not a regular expression: {error}.") from error
    names = [name for name, _ in network.named_parameters()]
    if not any(wanted.search(name) for name in names if name.startswith("backbone.")):
        shown = ", ".join(block[0] for block in blocks(network))
        raise ModelError(f"{pattern!r} matches no parameter of the backbone; the blocks begin with {shown}.")
    return [name for name in names if wanted.search(name) or not name.startswith("backbone.")]


def layer_rates(network: Network, decay: float) -> dict[str, float]:
    """The factor of each parameter's learning rate: 1 in the head, decay in the block before it, decay² before that."""
    found = blocks(network)
    return {name: decay ** (len(found) - 1 - depth) for depth, block in enumerate(found) for name in block}
