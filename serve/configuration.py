"""A served model in the words of the protocol: ModelMetadata and Triton's ModelConfig."""

from collections.abc import Sequence

from bundle.tensor import TensorSpec
from protos import inference_pb2 as pb
from serve.models import ServedModel

_BACKENDS = {"edgeward_bundle": "edgeward", "onnxruntime_onnx": "onnxruntime"}


def model_metadata(model: ServedModel, versions: Sequence[int]) -> pb.ModelMetadataResponse:
    """What the model takes and gives.

    Args:
        model: that was asked for.
        versions: of it that are served.
    """
    response = pb.ModelMetadataResponse(name=model.name, versions=map(str, versions), platform=model.platform)
    for spec in model.inputs:
        response.inputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
    for spec in model.outputs:
        response.outputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
    return response


def model_config(model: ServedModel) -> pb.ModelConfig:
    """How the model is run."""
    gpu = model.device != "cpu"
    config = pb.ModelConfig(
        name=model.name,
        platform=model.platform,
        backend=_BACKENDS[model.platform],
        max_batch_size=model.max_batch,
        parameters={key: pb.ModelParameter(string_value=value) for key, value in model.facts.items()},
    )
    config.instance_group.add(
        name=f"{model.name}_0",
        count=1,
        kind=pb.ModelInstanceGroup.KIND_GPU if gpu else pb.ModelInstanceGroup.KIND_CPU,
        gpus=[0] if gpu else [],
    )
    for spec in model.inputs:
        may_miss = spec.name in model.optional
        config.input.add(name=spec.name, data_type=_data_type(spec), dims=_dims(spec, model), optional=may_miss)
    for spec in model.outputs:
        config.output.add(name=spec.name, data_type=_data_type(spec), dims=_dims(spec, model))
    return config


def _data_type(spec: TensorSpec) -> str:
    return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"


def _dims(spec: TensorSpec, model: ServedModel) -> tuple[int, ...]:
    return spec.shape[1:] if model.max_batch else spec.shape
