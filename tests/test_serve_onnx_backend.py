"""ONNX's own backend tests through a real server; `python -m benchmarks.onnx_nodes` asks all of them."""

import pytest

from benchmarks.onnx_nodes import collect, differing

OPERATORS = (
    *(
        "add",
        "argmax",
        "bitshift",
        "cast",
        "castlike",
        "concat",
        "constant",
        "dynamicquantizelinear",
        "gather",
        "identity",
    ),
    *("if_", "isnan", "loop", "lstm", "mod", "nonzero", "not_", "onehot", "optionalgetelement", "optionalhaselement"),
    *("quantizelinear", "reducemax", "regex_full_match", "reshape", "scan", "shape", "size", "softmax", "split"),
    *("string_concat", "string_split", "stringnormalizer", "topk", "unique", "where"),
    *("argmin", "bitwiseand", "clip", "compress", "constantofshape", "expand", "eyelike", "gathernd", "less", "matmul"),
    *("max", "mul", "pad", "rangeop", "relu", "scatternd", "sign", "slice", "squeeze", "tile", "transpose", "xor"),
)
DATATYPES = {"BOOL", "INT64", "UINT8", "UINT64", "FP16", "BF16", "FP32", "FP64", "BYTES"}


@pytest.fixture(scope="module")
def cases():
    return collect(OPERATORS)


def test_nodes_are_answered_as_the_runtime_answers_them_in_process(cases, tmp_path):
    """Names, datatypes, shapes and every bit of the outputs, of some hundred models in one repository."""
    asked = [(datatype, shape) for case in cases.askable for _, datatype, shape, _ in case.expected]

    assert len(cases.askable) > 150
    assert {datatype for datatype, _ in asked} >= DATATYPES
    assert sum(shape == () for _, shape in asked) > 10  # scalars stay scalars
    assert differing(cases.askable, tmp_path) == {}


def test_only_what_the_protocol_cannot_carry_is_refused(cases):
    """Sequences, and numbers that are smaller than a byte or of float8."""
    for name, words in cases.refused.items():
        assert any(kind in words for kind in ("seq(", "float8", "int4", "uint4", "int2", "uint2")), (name, words)
