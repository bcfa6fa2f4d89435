"""The first convolution in groups of four numbers: the same answers, and only where it comes out even."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bundle import preprocess
from bundle.manifest import ImageInput, Multiclass
from bundle.session import Session, optimized
from export import graph, quantize, ranges
from export.ladder import STATIC, Compiler
from export.memory import Memory
from finetune.model import ImageNetwork

TASKS = (Multiclass(name="kind", labels=("a", "b", "c")),)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(nn.Module):
    """A first convolution, and one behind it."""

    def __init__(self, *stem, channels=16, activation=nn.ReLU, **options):
        super().__init__()
        self.stem, self.activation = nn.Conv2d(3, channels, *stem, **options), activation()
        self.next = nn.Conv2d(channels, 8, 3)

    def forward(self, x):
        return self.next(self.activation(self.stem(x))).mean((2, 3))


def exported(backbone, height=20, width=24):
    """Its graph in fp32, its input, and examples."""
    scale = {"mean": MEAN, "std": STD}
    spec = ImageInput(column="image", height=height, width=width, resize=24, interpolation="bilinear", **scale)
    rows = list(np.random.default_rng(0).integers(0, 256, (12, height, width, 3), dtype=np.uint8))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ImageNetwork(backbone, 8, 3, spec).eval()
        for each in network.parameters():
            nn.init.normal_(each, std=0.1)
    return graph.to_onnx(network, spec, TASKS, rows), spec, rows


def logits(compiled, spec, rows):
    session = Session(compiled, device="cpu", threads=1)
    return np.concatenate([session.run(preprocess.collate([row], spec))["logits"] for row in rows])


def weights(compiled):
    """The shape of those of the first convolution."""
    model = onnx.load_from_string(compiled)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    return next(tuple(each.dims) for each in model.graph.initializer if each.name == first.input[1])


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (Images(7, 2, 3), (32, 4, 7, 8)),
        (Images(3, 2, 1), (32, 4, 3, 4)),
        (Images(3, 1, 1), (64, 4, 3, 5)),
        (Images((5, 3), (1, 2), (0, 1), channels=12, bias=False), (24, 4, 5, 4)),
        (Images(4, 4), (16, 4, 4, 3)),
        (Images(3, 2, 1, activation=nn.Hardswish), (32, 4, 3, 4)),
    ],
)
def test_the_answers_stay(backbone, shape):
    """Whatever the window, its step and its padding, and whatever follows: only rounding differs."""
    fp32, spec, rows = exported(backbone)
    packed = quantize.prepared(fp32, packed=True)

    assert weights(packed) == shape
    expected = logits(fp32, spec, rows)
    np.testing.assert_allclose(logits(packed, spec, rows), expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("backbone", "width"),
    [
        (Images(3, 2, 1), 22),  # pixels that are no whole groups
        (Images(3, 1, 0), 24),  # 22 outputs, four at a time
        (Images(3, 2, 1, channels=6), 24),  # 12 channels are too few for the kernel
        (Images(3, 2, 1, dilation=2), 24),
        (Images(3, 2, 1, padding_mode="reflect"), 24),  # another step between
    ],
)
def test_what_does_not_come_out_even_stays(backbone, width):
    """A convolution that the kernel could not take so is left as it was."""
    fp32, *_ = exported(backbone, width=width)

    assert quantize.stem(onnx.load_from_string(quantize.prepared(fp32))) is None
    assert quantize.prepared(fp32, packed=True) == quantize.prepared(fp32)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardswish])
def test_int8_has_no_conversion_more(activation):
    """Pixels are int8 from the first step on, and the answers are as near to those of fp32 as without."""
    fp32, spec, rows = exported(Images(3, 2, 1, activation=activation))
    expected, errors, left = logits(fp32, spec, rows), [], []
    for packed in (False, True):
        start = quantize.prepared(fp32, packed=packed)
        known = ranges.ranges(ranges.observe(start, spec, rows), "minmax")
        compiled = quantize.int8_static(start, spec, known)
        errors.append(np.abs(logits(compiled, spec, rows) - expected).max())
        left.append(quantize.leftovers(compiled))
    first = [node.op_type for node in onnx.load_from_string(optimized(compiled)).graph.node][:2]

    assert first == ["Reshape", "QLinearAdd"]
    assert left[1] <= left[0]
    assert errors[1] < 0.1 * np.abs(expected).max()


def test_a_stem_that_stays_in_fp32_stays_as_it_was(monkeypatch):
    """Mixed precision keeps the first convolution, not what it would have become in int8."""
    monkeypatch.setattr(quantize, "suits", lambda *, signed: not signed)
    fp32, spec, rows = exported(Images(3, 2, 1))
    source = SimpleNamespace(spec=spec, graph=fp32, calibration=rows, memory=Memory((), enabled=False))
    compiler = Compiler(source, signed=False)
    first, *_ = quantize.groups(compiler.prepared, spec)

    kept, tried = (compiler.compile(replace(STATIC, kept=nodes)) for nodes in (first.nodes, ()))
    assert weights(kept) == (16, 3, 3, 3)
    assert quantize.stem(onnx.load_from_string(Compiler(source, signed=True).packed)) in first.nodes
    assert [node.op_type for node in onnx.load_from_string(tried).graph.node].count("Cast") == 0
