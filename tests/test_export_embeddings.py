"""Embedding tables in int8: what is quantized, how nearly, and what is left alone."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bundle.session import Session
from export.embeddings import LARGE, quantized_embeddings

WIDTH = 64
ROWS = LARGE // WIDTH


def graph_of(table, *, tied=False):
    """Look rows up and add them; a tied table is multiplied by, too."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "lookup"),
        helper.make_node("ReduceSum", ["rows", "axes"], ["sum"], keepdims=0),
    ]
    if tied:
        nodes.append(helper.make_node("MatMul", ["sum", "table"], ["logits"]))
    shape = ["batch", table.shape[1]]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "length"])],
            [helper.make_tensor_value_info("logits" if tied else "sum", onnx.TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.int64([1]), "axes")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


def table(rows=ROWS, width=WIDTH):
    """Columns of very different size: one scale for all of them would lose the small ones."""
    return (np.random.default_rng(0).normal(size=(rows, width)) * np.logspace(-3, 1, width)).astype(np.float32)


def test_rows_are_looked_up_in_int8():
    """A quarter of the bytes, and every number within half a step of its column."""
    values = table()
    values[:, 3] = 0
    before = graph_of(values)
    after = quantized_embeddings(before)
    ids = np.random.default_rng(1).integers(0, ROWS, (5, 1))
    got = Session(after, device="cpu", threads=1).run({"ids": ids})["sum"]

    assert len(after) < len(before) / 3.9
    onnx.checker.check_model(after)
    steps = np.abs(values).max(axis=0) / 127
    assert (np.abs(got - values[ids[:, 0]]) <= steps * 0.501).all()


@pytest.mark.parametrize("why", ["small", "shared", "not finite"])
def test_what_would_not_pay_or_not_be_exact_is_left_alone(why):
    """A small table, one that a product reads as well, and one with a NaN."""
    values = table(width=512, rows=512) if why == "shared" else table(rows=ROWS - 1 if why == "small" else ROWS)
    if why == "not finite":
        values[0, 0] = np.nan
    before = graph_of(values, tied=why == "shared")

    assert quantized_embeddings(before) == onnx.load_from_string(before).SerializeToString()
