"""BatchNorm folded into the layer before it, in PyTorch, where nothing has to guess it from a graph.

Left to the exporter it has cost whole networks: onnxscript's fusion gave ResNets other weights (pytorch #169178).
"""

import copy
from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from bundle.log import log
from finetune.model import Network

_Conv = nn.modules.conv._ConvNd
_BatchNorm = nn.modules.batchnorm._BatchNorm
_Layer = _Conv | nn.Linear


def folded(network: Network) -> Network:
    """A copy in which no BatchNorm is left that follows a convolution or a linear layer and nothing else.

    Pairs are found by torch.fx; a backbone that it cannot trace stays as it is, and so does a layer that does more
    than its class says, which is tried on random numbers. Both are logged.

    Args:
        network: in eval mode, float32, on the CPU.
    """
    network = copy.deepcopy(network)
    found = sum(isinstance(module, _BatchNorm) for module in network.backbone.modules())
    if not found:
        return network
    done = 0
    for (before, layer), (after, norm) in _pairs(network.backbone):
        fold = _fold(layer, norm)
        if _same(layer, norm, fold):
            network.backbone.set_submodule(before, fold)
            network.backbone.set_submodule(after, nn.Identity())
            done += 1
    log.info("batch norm folded", layers=done, left=found - done)
    return network


class _Tracer(fx.Tracer):
    """Does not look into layers, nor into classes derived from them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _Conv | nn.Linear | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _pairs(backbone: nn.Module) -> list[tuple[tuple[str, _Layer], tuple[str, _BatchNorm]]]:
    """Layers and the BatchNorm that alone sees what each gives, with their names; all are called once."""
    try:
        graph = _Tracer().trace(backbone)
    except Exception as error:  # whatever the backbone's code raises when it is run on proxies
        log.warning("batch norm is left to the exporter", because=f"torch.fx cannot trace the model: {error}")
        return []
    calls = {node: backbone.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    count = Counter(calls.values())
    pairs = []
    for node, norm in calls.items():
        before = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else node
        layer = calls.get(before)
        if not isinstance(layer, _Conv | nn.Linear) or not isinstance(norm, _BatchNorm) or norm.running_var is None:
            continue
        if len(before.users) == count[layer] == count[norm] == 1:
            pairs.append(((str(before.target), layer), (str(node.target), norm)))
    return pairs


def _fold(layer: _Layer, norm: _BatchNorm) -> _Layer:
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    return fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, nn.modules.conv._ConvTransposeNd))


def _same(layer: _Layer, norm: _BatchNorm, fold: _Layer) -> bool:
    """Whether a folded layer gives what the two gave, on random numbers: a derived class may do more than its name."""
    values = torch.randn(_size(layer), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = norm(layer(values)), fold(values)
    return bool(torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())))


def _size(layer: _Layer) -> list[int]:
    if isinstance(layer, nn.Linear):
        return [2, layer.in_features]
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [2, layer.in_channels, *(2 + size for size in reach)]
