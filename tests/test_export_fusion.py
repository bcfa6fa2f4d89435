"""Attention becomes one operator in every encoder of the kind of BERT, and computes what it did."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch
import transformers

from bundle import preprocess
from bundle.manifest import Multiclass, TextInput
from bundle.session import Session
from export import fusion, graph, quantize
from finetune.model import TextNetwork

WORDS, LENGTH, LAYERS = 60, 32, 2
TASKS = (Multiclass(name="kind", labels=("a", "b", "c")),)
SIZES = {"vocab_size": WORDS, "max_position_embeddings": LENGTH + 4}
BERT = {**SIZES, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS = {
    "bert": transformers.BertConfig(**BERT),
    "roberta": transformers.RobertaConfig(**BERT, pad_token_id=1, type_vocab_size=1),
    "distilbert": transformers.DistilBertConfig(**SIZES, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=64),
}


def encoder(kind):
    """A random encoder, its input, and random examples of mixed length."""
    random = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = transformers.AutoModel.from_config(CONFIGS[kind], attn_implementation="sdpa")
        backbone.pooler = None
        network = TextNetwork(backbone, 32, 3, 0.1, "mean").eval()
    spec = TextInput(column="a", max_length=LENGTH, pad_id=0, buckets=(8, 16, LENGTH))
    rows = [random.integers(2, WORDS, n) for n in (2, 3, 5, 30, 7, 11, 20, 16)]
    return network, spec, rows


@cache
def exported(kind):
    network, spec, rows = encoder(kind)
    return network, spec, rows, graph.to_onnx(network, spec, TASKS, rows)


def kinds(compiled):
    return [node.op_type for node in onnx.load_from_string(compiled).graph.node]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_attention_is_fused(kind):
    """Each layer has one operator, one product for query, key and value, and parity at all lengths."""
    network, spec, rows, fp32 = exported(kind)
    found = kinds(fp32)
    assert found.count("MultiHeadAttention") == LAYERS
    assert found.count("MatMul") == LAYERS * 4
    assert not {"Softmax", "GatherND", "Range", "IsNaN"} & set(found)
    assert graph.check_parity(fp32, network, spec, TASKS, rows).served < 1e-5


def test_padding_is_masked():
    """What stands at padded positions, between tokens too, changes nothing; a row without any token is PyTorch's."""
    network, _, _, fp32 = exported("bert")
    session, random = Session(fp32, device="cpu", threads=1), np.random.default_rng(1)
    mask = random.integers(0, 2, (5, 12))
    mask[0], mask[:, 3] = 1, 1
    mask[4] = 0
    ids = random.integers(2, WORDS, mask.shape)
    one, other = (
        session.run({"input_ids": np.where(mask, ids, filler), "attention_mask": mask})["logits"] for filler in (0, 9)
    )
    with torch.inference_mode():
        expected = network(torch.from_numpy(np.where(mask, ids, 0)), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(one, expected, atol=1e-5)
    np.testing.assert_allclose(one[:4], other[:4], atol=1e-6)


def test_any_weight_of_an_attention_counts():
    """One wrong number in the joined weights fails parity."""
    network, spec, rows, fp32 = exported("bert")
    model = onnx.load_from_string(fp32)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".qkv.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, -1] += 0.3
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(graph.GateFailed, match="the exporter changes a logit"):
        graph.check_parity(model.SerializeToString(), network, spec, TASKS, rows)


def test_fused_attention_is_quantized():
    """All dense layers of the encoder run in int8, dynamic and static, near the fp32 answers."""
    _, spec, rows, fp32 = exported("bert")
    dynamic, static = quantize.int8_dynamic(fp32), quantize.int8_minmax(fp32, spec, rows)
    assert kinds(dynamic).count("DynamicQuantizeMatMul") >= LAYERS * 4
    assert kinds(static).count("MatMulIntegerToFloat") >= LAYERS * 4
    feeds = preprocess.collate(rows, spec)
    one, *others = (Session(each, device="cpu", threads=1).run(feeds)["logits"] for each in (fp32, dynamic, static))
    for other in others:
        np.testing.assert_allclose(other, one, atol=0.15 * one.std())


def test_fusions_are_counted_as_they_run():
    """What ONNX Runtime fuses by itself is counted beside what was fused before."""
    counts = fusion.fusions(exported("bert")[3])
    assert counts["MultiHeadAttention"] == LAYERS
    assert counts["BiasGelu"] == LAYERS
    assert counts.get("LayerNormalization", 0) + counts.get("SkipLayerNormalization", 0) == 2 * LAYERS + 1


def test_nothing_of_the_exporting_machine_is_in_the_graph():
    """Neither stack traces nor the names of modules' classes."""
    assert b"forward" not in exported("bert")[3]
    assert b".py" not in exported("bert")[3]
