"""A served model in the words of the protocol: ModelMetadata and Triton's ModelConfig."""

from collections.abc import Sequence

from protos import inference_pb2 as pb
from serve.models import ServedModel
from serve.pbtxt import data_type

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
    """How the model is run: what its config.pbtxt said, if it has one, and what is really there."""
    config = pb.ModelConfig()
    if model.config is not None:
        config.CopyFrom(model.config)
    elif model.policy.max_batch > 1:
        config.dynamic_batching.max_queue_delay_microseconds = round(model.policy.max_delay_s * 1e6)
    config.name = model.name
    config.platform = model.platform
    config.backend = _BACKENDS[model.platform]
    config.max_batch_size = model.max_batch
    for key, value in model.facts.items():
        config.parameters[key].string_value = value
    _set_instances(config, model)
    _set_tensors(config, model)
    return config


def _set_instances(config: pb.ModelConfig, model: ServedModel) -> None:
    del config.instance_group[:]
    config.instance_group.add(
        name=f"{model.name}_0",
        count=model.policy.instances,
        kind=pb.ModelInstanceGroup.KIND_CPU if model.device == "cpu" else pb.ModelInstanceGroup.KIND_GPU,
        gpus=[] if model.device == "cpu" else [0],
    )


def _set_tensors(config: pb.ModelConfig, model: ServedModel) -> None:
    formats = {each.name: each.format for each in config.input}
    labels = {each.name: each.label_filename for each in config.output}
    batched = model.max_batch > 0  # then the first axis is left out of dims
    del config.input[:], config.output[:]
    for spec in model.inputs:
        config.input.add(
            name=spec.name,
            data_type=data_type(spec),
            format=formats.get(spec.name),
            dims=spec.shape[batched:],
            optional=spec.name in model.optional,
        )
    for spec in model.outputs:
        config.output.add(
            name=spec.name, data_type=data_type(spec), dims=spec.shape[batched:], label_filename=labels.get(spec.name)
        )
