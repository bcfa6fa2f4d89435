"""Low-rank changes: what they touch, that they train, and that nothing but weights is left of them."""

import numpy as np
import pytest
import torch
from torch import nn

from bundle.errors import ModelError
from bundle.preprocess import collate, encoder
from finetune import evaluate
from finetune.checkpoint import load_checkpoint
from finetune.lora import merge_lora, with_lora
from finetune.model import VectorNetwork
from tests.finetune_examples import tweets, write_bert, write_factory
from tests.model_examples import load, write


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


def example(source, bert, folder):
    """A model and rows that it takes."""
    if source == "bert":
        pretrained = load(f"transformers:{bert}")
        encode = encoder(pretrained.input, pretrained.files.__getitem__)
        return pretrained, [encode(text.encode()) for text, _ in tweets(6)]
    model = "torchvision:resnet18" if source == "resnet18" else f"python:{write_factory(folder)}:tiny"
    options = {"weights": "none", "image_size": 32} if source == "resnet18" else {}
    pretrained = load(model, **options)
    size = pretrained.input.height
    return pretrained, list(np.random.default_rng(0).integers(0, 256, (6, size, size, 3), dtype=np.uint8))


def train(network, rows, spec, names, steps=3):
    """A few steps of the parameters that are named, with everything else as it is in evaluation."""
    network.eval()
    parameters = [p for name, p in network.named_parameters() if name in names]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    labels = torch.arange(len(rows)) % 4
    inputs = {name: torch.from_numpy(value) for name, value in collate(rows, spec).items()}
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(**inputs), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("source", ["bert", "resnet18", "factory"])
def test_changes_train_and_merge_away(source, bert, tmp_path):
    """Encoders and convolutional networks: they start at nothing, train, and leave the plain network changed."""
    pretrained, rows = example(source, bert, tmp_path)
    network = pretrained.network(4).eval()
    spec = pretrained.input
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    plain = evaluate.logits(network, rows, spec)
    names = with_lora(network, 4, seed=3)

    np.testing.assert_allclose(evaluate.logits(network, rows, spec), plain, atol=1e-5)
    assert {name for name in names if ".lora_" not in name} == {"head.weight", "head.bias"}
    few = sum(p.numel() for name, p in network.named_parameters() if name in names)
    assert few < sum(tensor.numel() for tensor in before.values())
    train(network, rows, spec, names)
    trained = evaluate.logits(network, rows, spec)
    merge_lora(network, rows, spec)

    after = network.state_dict()
    assert list(after) == list(before)
    assert "lora" not in repr(network)
    assert not hasattr(network.backbone, "peft_config")
    assert np.abs(trained - plain).max() > 0.01 * plain.std()
    np.testing.assert_allclose(evaluate.logits(network, rows, spec), trained, atol=1e-3 * trained.std())
    assert all(p.requires_grad for p in network.parameters())
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert any("bias" in name or "running_mean" in name for name in same)
    assert not any(name.endswith(("query.weight", "0.conv1.weight", "3.weight")) for name in same)
    checkpoint = load_checkpoint(write(pretrained, network, tmp_path / "checkpoint"))
    np.testing.assert_array_equal(evaluate.logits(checkpoint.network, rows, spec), evaluate.logits(network, rows, spec))


def test_first_weights_are_of_the_seed(bert):
    """The seed decides the changes' first weights, and torch's own generator is left alone."""
    states = []
    for seed in (1, 1, 2):
        network = load(f"transformers:{bert}").network(4)
        torch.manual_seed(len(states))
        expected = torch.rand(1)
        torch.manual_seed(len(states))
        with_lora(network, 2, seed=seed)
        assert torch.equal(torch.rand(1), expected)
        states.append({name: t for name, t in network.state_dict().items() if "lora_A" in name})

    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_layers_that_are_not_called_get_none():
    """Attention uses its projection without calling it, and grouped convolutions have no low rank to speak of."""
    from torchvision.models import get_model

    network = VectorNetwork(get_model("vit_b_16", weights=None), 1, 1, 0.0)
    names = with_lora(network, 1, seed=0)
    assert any("mlp.0.lora_A" in name for name in names)
    assert not any("self_attention" in name for name in names)
    bare = VectorNetwork(nn.Conv2d(4, 4, 3, groups=4), 1, 1, 0.0)
    with pytest.raises(ModelError, match="no linear or convolutional layer"):
        with_lora(bare, 1, seed=0)


def test_a_merge_that_changes_the_logits_is_refused(bert, tmp_path):
    """What was trained must be what is written: here the layer merges something else than it computes."""
    pretrained, rows = example("factory", bert, tmp_path)
    network = pretrained.network(4).eval()
    names = with_lora(network, 2, seed=0)
    train(network, rows, pretrained.input, names)
    layer = network.backbone[0]
    layer.get_delta_weight = lambda adapter: torch.zeros_like(layer.get_base_layer().weight)

    with pytest.raises(ModelError, match=r"merging the low-rank changes moved a logit by .* Nothing was written"):
        merge_lora(network, rows, pretrained.input)
