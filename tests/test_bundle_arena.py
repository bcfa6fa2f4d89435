"""What the runtime keeps of memory after large runs comes back when the runs are small again."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from bundle.arena import LARGE, RUNS, HighWater
from bundle.session import Session
from tests.serve_bundles import model_bytes

SMALL, LENGTH = np.ones(16, np.float32), 1 << 20


def resident():
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def wide():
    """A graph whose intermediate results take 16 times as much as its input."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "one"], ["column"]),
        helper.make_node("Mul", ["column", "row"], ["table"]),
        helper.make_node("Softmax", ["table"], ["shares"], axis=1),
        helper.make_node("ReduceSum", ["shares", "one"], ["y"], keepdims=0),
    ]
    weights = {"one": np.array([1]), "row": np.arange(16, dtype=np.float32)}
    return model_bytes(nodes, [("x", TensorProto.FLOAT, ["n"])], [("y", TensorProto.FLOAT, ["n"])], weights)


def test_memory_of_a_large_run_is_given_back_after_small_ones():
    """It is kept for the next large run, and no longer than there is none."""
    session = Session(wide(), device="cpu", threads=1)
    session.run({"x": SMALL})
    before = resident()
    session.run({"x": np.ones(LENGTH, np.float32)})
    kept = resident() - before
    for _ in range(2 * RUNS):
        (answer,) = session.run({"x": SMALL}).values()

    assert kept > LENGTH * 4 * 16
    assert resident() - before < kept / 4
    np.testing.assert_allclose(answer, SMALL, rtol=1e-6)


def test_memory_that_is_needed_is_kept():
    """Large runs now and then, or inputs that vary by less, give nothing back."""
    water = HighWater()
    for _ in range(10):
        assert not any([water.ebbs(LARGE * 100), *(water.ebbs(100) for _ in range(RUNS - 1))])


def test_it_is_given_back_once():
    """By the run that ends as many as are looked at, of which none was large; then it is known to be gone."""
    water = HighWater()
    water.ebbs(LARGE * 100 + 1)

    told = [water.ebbs(100) for _ in range(5 * RUNS)]

    assert [number + 2 for number, each in enumerate(told) if each] == [2 * RUNS]
