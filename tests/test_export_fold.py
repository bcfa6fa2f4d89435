"""BatchNorm is folded into the layer before it wherever that changes nothing."""

import onnx
import pytest
import torch
from torch import nn
from torchvision.models import get_model

from bundle.manifest import ImageInput, Multiclass
from export import fold, graph
from finetune.classifier import cut_head
from finetune.model import ImageNetwork
from tests.export_examples import tiny

SIDE = 32
SPEC = ImageInput(
    column="image", height=SIDE, width=SIDE, resize=SIDE, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
)
TASKS = (Multiclass(name="kind", labels=("a", "b")),)


class Rectified(nn.Conv2d):
    """A convolution that does more than its class says."""

    def forward(self, x):
        return super().forward(x).relu()


class Branching(nn.Module):
    """Cannot be traced: its path depends on the values."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.layers(x) if x.sum() > 0 else self.layers(-x)


class Shared(nn.Module):
    """One convolution in front of two BatchNorms."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.one(self.conv(x)) + self.other(self.conv(x))


def network(backbone, width):
    """With statistics and weights that a trained BatchNorm could have."""
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return ImageNetwork(backbone, width, 2, SPEC).eval()


def norms(network):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def images(count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_no_batch_norm_is_left(name):
    """Residual, inverted residual and squeeze networks lose all of it, give what they gave, and stay as they were."""
    model = get_model(name, weights=None).eval()
    backbone, width, _ = cut_head(model, SIDE, SIDE, name)
    whole = network(backbone, width)
    before = norms(whole)
    folded = fold.folded(whole)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images()), whole(images()), rtol=1e-3, atol=1e-4)
    assert norms(folded) == 0
    assert norms(whole) == before > 0


def test_the_exported_graph_has_none():
    """A convolution, a linear layer and their BatchNorms become two operators."""
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    whole = network(nn.Sequential(*layers, nn.Linear(4, 8), nn.BatchNorm1d(8)), 8)
    rows = list(images(4).numpy())
    exported = graph.to_onnx(whole, SPEC, TASKS, rows)
    kinds = [node.op_type for node in onnx.load_from_string(exported).graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("Conv") == 1
    assert kinds.count("Gemm") == 2
    assert graph.check_parity(exported, whole, SPEC, TASKS, rows).served < 1e-4


@pytest.mark.parametrize(
    "layers",
    [
        lambda: nn.Sequential(Rectified(3, 4, 3), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
        Branching,
        Shared,
    ],
)
def test_what_cannot_be_folded_stays(layers):
    """Behind an activation, before a convolution, in code that cannot be traced, and where a layer is used twice."""
    whole = network(nn.Sequential(layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4)
    folded = fold.folded(whole)
    assert norms(folded) == norms(whole)
    torch.testing.assert_close(folded(images()), whole(images()), rtol=0, atol=0)


def test_a_transposed_convolution_is_folded():
    """Its output channels are the second axis of the weight."""
    layers = nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    whole = network(nn.Sequential(*layers), 4)
    folded = fold.folded(whole)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(images()), whole(images()), rtol=1e-4, atol=1e-5)


def test_networks_without_it_are_unchanged():
    """The weights of a text encoder are those that it had."""
    whole, _, _ = tiny("text")
    before, after = whole.state_dict(), fold.folded(whole).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
