"""The wire does not drift: generated code is that of inference.proto, numbers stay what they are, Triton's agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto

from protos import inference_pb2 as pb

ROOT = Path(__file__).parent.parent
GENERATED = ["inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py"]

FIELDS = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live=1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready=1",
    "ModelReadyRequest": "name=1 version=2",
    "ModelReadyResponse": "ready=1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name=1 version=2 extensions=3",
    "ModelMetadataRequest": "name=1 version=2",
    "ModelMetadataResponse": "name=1 versions=2 platform=3 inputs=4 outputs=5",
    "ModelMetadataResponse.TensorMetadata": "name=1 datatype=2 shape=3",
    "ModelInferRequest": "model_name=1 model_version=2 id=3 parameters=4 inputs=5 outputs=6 raw_input_contents=7",
    "ModelInferRequest.InferInputTensor": "name=1 datatype=2 shape=3 parameters=4 contents=5",
    "ModelInferRequest.InferRequestedOutputTensor": "name=1 parameters=2",
    "ModelInferResponse": "model_name=1 model_version=2 id=3 parameters=4 outputs=5 raw_output_contents=6",
    "ModelInferResponse.InferOutputTensor": "name=1 datatype=2 shape=3 parameters=4 contents=5",
    "InferParameter": "bool_param=1 int64_param=2 string_param=3 double_param=4 uint64_param=5",
    "InferTensorContents": "bool_contents=1 int_contents=2 int64_contents=3 uint_contents=4 uint64_contents=5 "
    "fp32_contents=6 fp64_contents=7 bytes_contents=8",
    "ModelConfigRequest": "name=1 version=2",
    "ModelConfigResponse": "config=1",
    "ModelInput": "name=1 data_type=2 dims=4",
    "ModelOutput": "name=1 data_type=2 dims=3",
    "ModelInstanceGroup": "name=1 count=2 gpus=3 kind=4",
    "ModelParameter": "string_value=1",
    "ModelConfig": "name=1 platform=2 max_batch_size=4 input=5 output=6 instance_group=7 parameters=14 backend=17",
}
ENUMS = {
    "DataType": "TYPE_INVALID=0 TYPE_BOOL=1 TYPE_UINT8=2 TYPE_UINT16=3 TYPE_UINT32=4 TYPE_UINT64=5 TYPE_INT8=6 "
    "TYPE_INT16=7 TYPE_INT32=8 TYPE_INT64=9 TYPE_FP16=10 TYPE_FP32=11 TYPE_FP64=12 TYPE_STRING=13 TYPE_BF16=14",
    "ModelInstanceGroup.Kind": "KIND_AUTO=0 KIND_GPU=1 KIND_CPU=2 KIND_MODEL=3",
}
CALLS = ["ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelConfig"]


def messages(descriptors):
    for descriptor in descriptors:
        if not descriptor.GetOptions().map_entry:
            yield descriptor
            yield from messages(descriptor.nested_types)


def descriptor_proto(descriptor):
    proto = DescriptorProto()
    descriptor.CopyToProto(proto)
    return proto


def ours():
    return {
        descriptor.full_name.removeprefix("inference."): descriptor
        for descriptor in messages(pb.DESCRIPTOR.message_types_by_name.values())
    }


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    out = tmp_path_factory.mktemp("protos")
    flags = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "pyi")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *flags, "protos/inference.proto"], cwd=ROOT, check=True
    )
    return out / "protos"


@pytest.mark.parametrize("name", GENERATED)
def test_committed_code_is_what_the_proto_generates(generated, name):
    """Byte for byte; `make protos` writes it anew."""
    assert (ROOT / "protos" / name).read_bytes() == (generated / name).read_bytes()


def test_field_numbers_stay():
    """A number that a client knows is never given to another field."""
    numbers = {
        name: " ".join(f"{field.name}={field.number}" for field in descriptor.fields)
        for name, descriptor in ours().items()
    }

    assert numbers == FIELDS


def test_enum_numbers_stay():
    """The values of enums, too."""
    kinds = {
        "DataType": pb.DESCRIPTOR.enum_types_by_name["DataType"],
        "ModelInstanceGroup.Kind": pb.ModelInstanceGroup.DESCRIPTOR.enum_types_by_name["Kind"],
    }

    assert {
        name: " ".join(f"{value.name}={value.number}" for value in kind.values) for name, kind in kinds.items()
    } == ENUMS


def test_calls_stay():
    """The service has the calls that docs/protocol.md lists, each from its Request to its Response."""
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]

    assert service.full_name == "inference.GRPCInferenceService"
    assert [
        (call.name, call.input_type.name, call.output_type.name, call.client_streaming, call.server_streaming)
        for call in service.methods
    ] == [(name, f"{name}Request", f"{name}Response", False, False) for name in CALLS]


def test_every_field_is_triton_s():
    """Name, number, type and repetition of every field are those that Triton's own client was generated with."""
    program = [sys.executable, str(ROOT / "tests" / "triton_client.py"), "0", "fields"]
    theirs = json.loads(subprocess.run(program, check=True, capture_output=True).stdout)

    for name, descriptor in ours().items():
        for field in descriptor_proto(descriptor).field:
            assert [field.number, field.type, field.label, field.type_name] == theirs[name][field.name], (
                name,
                field.name,
            )
