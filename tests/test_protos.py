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
    "ModelVersionPolicy": "latest=1 all=2 specific=3",
    "ModelVersionPolicy.Latest": "num_versions=1",
    "ModelVersionPolicy.All": "",
    "ModelVersionPolicy.Specific": "versions=1",
    "ModelInput": "name=1 data_type=2 format=3 dims=4 optional=8",
    "ModelOutput": "name=1 data_type=2 dims=3 label_filename=4",
    "ModelInstanceGroup": "name=1 count=2 gpus=3 kind=4",
    "ModelQueuePolicy": "timeout_action=1 default_timeout_microseconds=2 allow_timeout_override=3 max_queue_size=4",
    "ModelDynamicBatching": "preferred_batch_size=1 max_queue_delay_microseconds=2 preserve_ordering=3 "
    "priority_levels=4 default_priority_level=5 default_queue_policy=6 priority_queue_policy=7",
    "ModelParameter": "string_value=1",
    "ModelTransactionPolicy": "decoupled=1",
    "ModelConfig": "name=1 platform=2 version_policy=3 max_batch_size=4 input=5 output=6 instance_group=7 "
    "default_model_filename=8 dynamic_batching=11 parameters=14 backend=17 model_transaction_policy=19",
    "ModelStreamInferResponse": "error_message=1 infer_response=2",
    "ModelStatisticsRequest": "name=1 version=2",
    "StatisticDuration": "count=1 ns=2",
    "InferStatistics": "success=1 fail=2 queue=3 compute_input=4 compute_infer=5 compute_output=6 cache_hit=7 "
    "cache_miss=8",
    "InferBatchStatistics": "batch_size=1 compute_input=2 compute_infer=3 compute_output=4",
    "MemoryUsage": "type=1 id=2 byte_size=3",
    "ModelStatistics": "name=1 version=2 last_inference=3 inference_count=4 execution_count=5 inference_stats=6 "
    "batch_stats=7 memory_usage=8",
    "ModelStatisticsResponse": "model_stats=1",
    "ModelRepositoryParameter": "bool_param=1 int64_param=2 string_param=3 bytes_param=4",
    "RepositoryIndexRequest": "repository_name=1 ready=2",
    "RepositoryIndexResponse": "models=1",
    "RepositoryIndexResponse.ModelIndex": "name=1 version=2 state=3 reason=4",
    "RepositoryModelLoadRequest": "repository_name=1 model_name=2 parameters=3",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "repository_name=1 model_name=2 parameters=3",
    "RepositoryModelUnloadResponse": "",
    "SystemSharedMemoryStatusRequest": "name=1",
    "SystemSharedMemoryStatusResponse": "regions=1",
    "SystemSharedMemoryStatusResponse.RegionStatus": "name=1 key=2 offset=3 byte_size=4",
    "SystemSharedMemoryRegisterRequest": "name=1 key=2 offset=3 byte_size=4",
    "SystemSharedMemoryRegisterResponse": "",
    "SystemSharedMemoryUnregisterRequest": "name=1",
    "SystemSharedMemoryUnregisterResponse": "",
    "CudaSharedMemoryStatusRequest": "name=1",
    "CudaSharedMemoryStatusResponse": "regions=1",
    "CudaSharedMemoryStatusResponse.RegionStatus": "name=1 device_id=2 byte_size=3",
    "CudaSharedMemoryRegisterRequest": "name=1 raw_handle=2 device_id=3 byte_size=4",
    "CudaSharedMemoryRegisterResponse": "",
    "CudaSharedMemoryUnregisterRequest": "name=1",
    "CudaSharedMemoryUnregisterResponse": "",
    "TraceSettingRequest": "settings=1 model_name=2",
    "TraceSettingRequest.SettingValue": "value=1",
    "TraceSettingResponse": "settings=1",
    "TraceSettingResponse.SettingValue": "value=1",
    "LogSettingsRequest": "settings=1",
    "LogSettingsRequest.SettingValue": "bool_param=1 uint32_param=2 string_param=3",
    "LogSettingsResponse": "settings=1",
    "LogSettingsResponse.SettingValue": "bool_param=1 uint32_param=2 string_param=3",
}
ENUMS = {
    "DataType": "TYPE_INVALID=0 TYPE_BOOL=1 TYPE_UINT8=2 TYPE_UINT16=3 TYPE_UINT32=4 TYPE_UINT64=5 TYPE_INT8=6 "
    "TYPE_INT16=7 TYPE_INT32=8 TYPE_INT64=9 TYPE_FP16=10 TYPE_FP32=11 TYPE_FP64=12 TYPE_STRING=13 TYPE_BF16=14",
    "ModelInstanceGroup.Kind": "KIND_AUTO=0 KIND_GPU=1 KIND_CPU=2 KIND_MODEL=3",
    "ModelQueuePolicy.TimeoutAction": "REJECT=0 DELAY=1",
}
CALLS = [
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
]


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
        "ModelQueuePolicy.TimeoutAction": pb.ModelQueuePolicy.DESCRIPTOR.enum_types_by_name["TimeoutAction"],
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
    ] == [
        ("ModelStreamInfer", "ModelInferRequest", "ModelStreamInferResponse", True, True)
        if name == "ModelStreamInfer"
        else (name, f"{name}Request", f"{name}Response", False, False)
        for name in CALLS
    ]


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
