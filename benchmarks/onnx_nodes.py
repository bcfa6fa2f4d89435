"""ONNX's own backend tests through the server: does it answer each node as ONNX Runtime does in process, bit for bit?

    python -m benchmarks.onnx_nodes

Every node model that the runtime can run and whose tensors the protocol can carry goes into one repository, which one
server serves; each is asked over gRPC with the inputs of its test, and its outputs, datatypes, shapes and bytes, are
held against those of a session of the runtime itself. Nodes that draw random numbers are left out: two sessions differ.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnx.backend.test.case import node as nodes
from onnx.backend.test.loader import load_model_tests

from bundle.errors import ModelError
from bundle.log import configure
from bundle.session import Session
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from serve.config import ServeConfig
from serve.server import start
from serve.tensors import datatype_of, to_raw

Answer = list[tuple[str, str, tuple[int, ...], bytes]]
"""Name, datatype, shape and raw bytes of every output."""


@dataclass(frozen=True)
class Case:
    """One node of ONNX's tests.

    Attributes:
        name: of the test.
        graph: a serialised ONNX model.
        inputs: arrays by name; bfloat16 as two raw bytes.
        expected: what the runtime gives in process.
    """

    name: str
    graph: bytes
    inputs: Mapping[str, np.ndarray]
    expected: Answer


@dataclass(frozen=True)
class Cases:
    """The tests, and why some of them cannot be asked.

    Attributes:
        total: how many tests there are.
        askable: those that the runtime can run, and the protocol can carry.
        refused: those that the runtime loads, but whose tensors the protocol cannot carry: the error by name.
        random: names of those that give other numbers every time.
    """

    total: int
    askable: list[Case]
    refused: dict[str, str]
    random: list[str]


def collect(operators: Sequence[str] = ()) -> Cases:
    """The node tests of the installed onnx package.

    Args:
        operators: modules of onnx.backend.test.case.node; none: all of them, which takes some 10 seconds.
    """
    tests = _tests(operators)
    cases = Cases(len(tests), [], {}, [])
    for test in tests:
        graph = test.model.SerializeToString()
        try:
            session = Session(graph, device="cpu", threads=1)
        except ModelError as error:
            if _loads(graph):
                cases.refused[test.name] = str(error)
            continue
        inputs = _arrays(test.model.graph.input, test.data_sets[0][0])
        try:
            first, second = (_in_process(graph, session, inputs) for _ in range(2))
        except Exception:  # the runtime cannot run it; its own classes derive from Exception
            continue
        if first == second:
            cases.askable.append(Case(test.name, graph, inputs, first))
        else:
            cases.random.append(test.name)
    return cases


def _tests(operators: Sequence[str]) -> Sequence[Any]:
    with warnings.catch_warnings(action="ignore"):  # numpy's, while the tests are made
        if not operators:
            return load_model_tests(kind="node")
        for operator in operators:
            import_module(f"{nodes.__name__}.{operator}")  # which registers its tests
    return [test for test in nodes._NodeTestCases if test.data_sets]


def _loads(graph: bytes) -> bool:
    try:
        onnxruntime.InferenceSession(graph, _silent(), providers=["CPUExecutionProvider"])
    except Exception:  # the runtime's own classes derive from Exception
        return False
    return True


def _silent() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return options


def _arrays(given: Sequence[onnx.ValueInfoProto], values: Sequence[Any]) -> dict[str, np.ndarray]:
    arrays = {}
    for info, value in zip(given, values, strict=False):  # those left out stand last
        array = np.asarray(numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value)
        arrays[info.name] = array.view("V2") if array.dtype.name == "bfloat16" else array
    return arrays


def _in_process(graph: bytes, session: Session, inputs: Mapping[str, np.ndarray]) -> Answer:
    """By a new session of the runtime, or where it lacks the Python types, by `session`, which is its own only."""
    if any(spec.datatype == "BF16" for spec in (*session.inputs, *session.outputs)):
        outputs = session.run(inputs)
    else:
        runtime = onnxruntime.InferenceSession(graph, _silent(), providers=["CPUExecutionProvider"])
        values = runtime.run(None, inputs)
        outputs = {node.name: np.asarray(value) for node, value in zip(runtime.get_outputs(), values, strict=True)}
    return [
        (name, datatype_of(array, name), array.shape, to_raw(array, datatype_of(array, name)))
        for name, array in outputs.items()
    ]


def asked(stub: rpc.GRPCInferenceServiceStub, case: Case) -> Answer | str:
    """What the server answers, or the status and words with which it refuses."""
    request = pb.ModelInferRequest(model_name=case.name)
    for name, array in case.inputs.items():
        datatype = datatype_of(array, name)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(to_raw(array, datatype))
    try:
        response = stub.ModelInfer(request, timeout=60)
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    return [
        (output.name, output.datatype, tuple(output.shape), raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    ]


def differing(cases: Sequence[Case], folder: Path) -> dict[str, Answer | str]:
    """Serve the graphs from a repository in `folder`: what was answered, by name, where it is not what was expected."""
    for case in cases:
        (folder / case.name / "1").mkdir(parents=True)
        (folder / case.name / "1" / "model.onnx").write_bytes(case.graph)
    server = start(ServeConfig(paths=(folder,), port=0, device="cpu", threads=1))
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = rpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            answers = {case.name: asked(stub, case) for case in cases}
    finally:
        server.stop()
    return {case.name: answers[case.name] for case in cases if answers[case.name] != case.expected}


def main() -> int:
    """Ask everything, print what differs and how many of how many agree; 1 where any differs."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    configure(wanted=lambda level: level == "error")
    cases = collect()
    with tempfile.TemporaryDirectory() as folder:
        wrong = differing(cases.askable, Path(folder))
    for name, answer in wrong.items():
        print(name, answer if isinstance(answer, str) else [each[:3] for each in answer])
    carried = len(cases.askable) + len(cases.random)
    print(
        f"{cases.total} tests; the runtime takes {carried + len(cases.refused)}; {len(cases.refused)} have tensors "
        f"that the protocol cannot carry, {len(cases.random)} are random.\n"
        f"{len(cases.askable) - len(wrong)} of {len(cases.askable)} are answered bit for bit as in process."
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
