"""Pre-flight: a model that could not ship is refused before it is trained."""

import numpy as np
import pytest
import torch
from torch import nn

from bundle.errors import GateFailed
from bundle.log import captured
from export import preflight as module
from export.preflight import preflight
from finetune.model import VectorNetwork
from tests.export_examples import KINDS, SIZE, TASKS, clock, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_tried_in_int8(kind):
    """Parity, drift and latency of an untrained network; its mode and weights are as they were."""
    network, spec, rows = tiny(kind, count=60)
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = preflight(network, spec, TASKS, rows, max_latency_ms=3, threads=1, timer=clock(1.0, 0.5, ms=4))

    assert found.parity.served <= found.parity.tolerance
    assert (found.fp32_ms, found.int8_ms, found.max_latency_ms) == (4, 2, 3)
    assert found.drift.variant == ("int8-static" if kind in ("image", "vector") else "int8-dynamic")
    assert 0.98 < found.drift.cosine <= 1
    assert 0 < found.drift.relative_error < 0.2
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_too_slow_a_model_is_refused_with_both_times():
    """Neither fp32 nor int8 meets the limit: the message has all three numbers."""
    network, spec, rows = tiny("vector")
    with pytest.raises(GateFailed, match=r"4\.00 ms in fp32, int8 is 3\.60 ms .* --max-latency-ms is 3\.5\."):
        preflight(network, spec, TASKS, rows, max_latency_ms=3.5, threads=1, timer=clock(1.0, 0.9, ms=4))
    assert preflight(network, spec, TASKS, rows, max_latency_ms=3.7, threads=1, timer=clock(1.0, 0.9, ms=4)).seconds


class Branching(VectorNetwork):
    """Decides by a value, which no graph can."""

    def features(self, features):
        hidden = self.backbone(features)
        return hidden if float(hidden.sum()) > 0 else -hidden


class Counting(VectorNetwork):
    """Depends on how many examples there are."""

    def features(self, features):
        return self.backbone(features) * features.shape[0] ** torch.rand(1).item()


@pytest.mark.parametrize(
    ("wrong", "message"), [(Branching, "cannot be exported"), (Counting, "is not the PyTorch model")]
)
def test_what_cannot_be_exported_is_refused(wrong, message):
    """Before training, with the exit code of the gate, and a word on how to train it anyway."""
    _, spec, rows = tiny("vector")
    network = wrong(nn.Sequential(nn.Linear(SIZE, 8)), 8, 6, 0.0)
    with pytest.raises(GateFailed, match=f"(?s)pre-flight: .*{message}.*--no-preflight"):
        preflight(network, spec, TASKS, rows, timer=clock(1.0, 1.0), threads=1)
    assert network.training


def test_features_that_int8_destroys_are_a_warning():
    """One number ten thousand times as large as the others takes all the steps of static int8; fp32 can still ship."""
    network, spec, rows = tiny("vector")
    rows = [row * np.array([10_000, 1, 1, 1, 1, 1], np.float32) for row in rows]
    with torch.no_grad():
        network.backbone[1].weight[:, 0] = 0
    with captured() as logs:
        found = preflight(network, spec, TASKS, rows, timer=clock(1.0, 0.5), threads=1)
    warnings = [entry for entry in logs if entry["level"] == "warning"]

    assert found.drift.relative_error > module.DRIFT
    assert found.drift.cosine < 0.9
    assert [entry["relative_error"] for entry in warnings] == [round(found.drift.relative_error, 4)]


def test_at_most_two_hundred_examples_are_looked_at():
    """Rows are encoded when they are asked for, so a large data set costs no more than a small one."""
    network, spec, rows = tiny("vector", count=300)
    asked = []

    class Rows(list):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    preflight(network, spec, TASKS, Rows(rows), timer=clock(1.0, 0.5), threads=1)
    assert asked == [slice(None, module.EXAMPLES)]
