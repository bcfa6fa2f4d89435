"""Triton's own Python client against a server, in a process of its own: it registers the same protobuf symbols.

`python triton_client.py PORT COMMAND` prints one JSON object; the tests of serve and of protos read it.
"""

import json
import sys

import numpy as np
import tritonclient.grpc as triton
from google.protobuf.descriptor_pb2 import DescriptorProto
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def fields():
    found = {}

    def add(descriptor):
        proto = DescriptorProto()
        descriptor.CopyToProto(proto)
        found[descriptor.full_name.removeprefix("inference.")] = {
            field.name: [field.number, field.type, field.label, field.type_name] for field in proto.field
        }
        for nested in descriptor.nested_types:
            add(nested)

    for file in (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR):
        for descriptor in file.message_types_by_name.values():
            add(descriptor)
    return found


def tensor(name, array):
    sent = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    sent.set_data_from_numpy(array)
    return sent


def arrays(result):
    return {
        output.name: [
            element.decode() if isinstance(element, bytes) else element
            for element in result.as_numpy(output.name).ravel().tolist()
        ]
        for output in result.get_response().outputs
    }


def bundle(client):
    texts = np.array([[b"the film is good"], [b""], ["né".encode()]], object)
    result = client.infer("mood", [tensor("text", texts)], request_id="7")
    return {**arrays(result), "id": result.get_response().id, "shape": result.as_numpy("score").shape}


def graph(client):
    ids = np.array([[2, 3, 4]], np.int64)
    sent = [tensor("input_ids", ids), tensor("attention_mask", np.ones_like(ids))]
    wanted = [triton.InferRequestedOutput("logits")]
    return arrays(client.infer("mood.onnx", sent, outputs=wanted, model_version="1", priority=1, timeout=1_000_000))


def about(client):
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model": client.is_model_ready("mood"),
        "other": client.is_model_ready("other"),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata("mood", as_json=True),
        "config": client.get_model_config("mood", as_json=True)["config"],
    }


def error(client):
    try:
        client.infer("mood", [tensor("text", np.array([b"no batch axis"], object))])
    except InferenceServerException as refused:
        return {"status": refused.status(), "message": refused.message()}
    return {}


def main():
    port, command = sys.argv[1:]
    if command == "fields":
        answer = fields()
    else:
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            answer = {"bundle": bundle, "graph": graph, "about": about, "error": error}[command](client)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
