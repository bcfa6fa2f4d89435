"""What the blocks of a network are, the last of them, and their learning rates."""

import pytest
import torch
from torch import nn

from bundle.errors import ModelError
from finetune.blocks import blocks, last_blocks, layer_rates, matching
from finetune.model import Network


def torchvision_network(name):
    from torchvision.models import get_model

    from finetune.classifier import cut_head

    with torch.random.fork_rng():
        backbone, width, _ = cut_head(get_model(name, weights=None), 64, 64, name)
    return Network(backbone, width, 3, 0.0)


def bert_network():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    return Network(BertModel(config, add_pooling_layer=False), 8, 3, 0.1)


def plain_network(*backbone):
    return Network(nn.Sequential(*backbone), 4, 3, 0.0)


def heads(network):
    """The module of each block's first parameter."""
    return [block[0].removeprefix("backbone.").rpartition(".")[0] for block in blocks(network)]


def test_every_parameter_is_in_one_block():
    """Blocks are a partition of the parameters, the head the last of them."""
    for network in (torchvision_network("resnet18"), torchvision_network("mobilenet_v3_small"), bert_network()):
        found = blocks(network)
        assert sorted(name for block in found for name in block) == sorted(
            name for name, _ in network.named_parameters()
        )
        assert found[-1] == ["head.weight", "head.bias"]


def test_blocks_of_a_resnet():
    """A stem of convolution and norm, and each residual block."""
    found = heads(torchvision_network("resnet18"))

    assert found == ["conv1", *(f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)), "head"]


def test_blocks_of_a_mobilenet():
    """Each inverted residual, and the hidden layer of its classifier."""
    found = heads(torchvision_network("mobilenet_v3_small"))

    assert found[:2] == ["features.0.0", "features.1.block.0.0"]
    assert found[-3:] == ["features.12.0", "classifier.0", "head"]
    assert len(found) == 15


def test_blocks_of_a_bert():
    """The embeddings, and each layer."""
    found = heads(bert_network())

    assert found == [
        "embeddings.word_embeddings",
        *(f"encoder.layer.{i}.attention.self.query" for i in range(3)),
        "head",
    ]


def test_what_follows_the_layers_belongs_to_the_last():
    """A last norm, and norms between layers of a stack, are of the block before them."""

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.stem = nn.Linear(4, 4)
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4)])
            self.norm = nn.LayerNorm(4)
            self.final = nn.Linear(4, 4)

    found = blocks(Network(Backbone(), 4, 3, 0.0))
    starts = [[name.removeprefix("backbone.").rpartition(".")[0] for name in block] for block in found]

    assert [list(dict.fromkeys(each)) for each in starts] == [
        ["", "stem"],
        ["layers.0", "layers.1"],
        ["layers.3", "norm", "final"],
        ["head"],
    ]


def test_a_backbone_without_stacks_is_one_block():
    """Where nothing tells layers apart, there are two blocks, and with nothing to train in the backbone the head."""

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    assert [len(block) for block in blocks(Network(Backbone(), 4, 3, 0.0))] == [4, 2]
    assert blocks(plain_network(nn.Flatten())) == [["head.weight", "head.bias"]]


def test_last_blocks():
    """The head is the first that counts; more blocks than there are is an error that says how many there are."""
    network = plain_network(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    assert last_blocks(network, 1) == ["head.weight", "head.bias"]
    assert last_blocks(network, 2) == ["backbone.2.weight", "backbone.2.bias", "head.weight", "head.bias"]
    assert len(last_blocks(network, 3)) == 6
    with pytest.raises(ModelError, match=r"last 4 blocks.*has 3"):
        last_blocks(network, 4)


def test_matching():
    """A pattern is found anywhere in a name; the head trains with it; one that matches nothing is an error."""
    network = plain_network(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    assert matching(network, r"\.2\.w") == ["backbone.2.weight", "head.weight", "head.bias"]
    with pytest.raises(ModelError, match=r"layer4.*matches no parameter.*backbone\.0\.weight"):
        matching(network, "layer4")
    with pytest.raises(ModelError, match=r"matches no parameter"):
        matching(network, "head")
    with pytest.raises(ModelError, match="regular expression"):
        matching(network, "(")


def test_rates_fall_towards_the_input():
    """Each block learns at a fraction of the rate of the next one."""
    rates = layer_rates(plain_network(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 0.5)

    assert rates == {
        "backbone.0.weight": 0.25,
        "backbone.0.bias": 0.25,
        "backbone.2.weight": 0.5,
        "backbone.2.bias": 0.5,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }
