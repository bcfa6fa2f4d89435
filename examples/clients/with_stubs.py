"""The label of a text, asked with grpcio and generated code alone.

In a project of your own, generate it from protos/inference.proto:
python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. protos/inference.proto

python with_stubs.py HOST:PORT MODEL TEXT
"""

import sys

import grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub

address, model, text = sys.argv[1:]
with grpc.insecure_channel(address) as channel:
    stub = GRPCInferenceServiceStub(channel)
    column = stub.ModelMetadata(pb.ModelMetadataRequest(name=model)).inputs[0].name
    request = pb.ModelInferRequest(model_name=model)
    texts = request.inputs.add(name=column, datatype="BYTES", shape=[1, 1])  # one row, one text
    texts.contents.bytes_contents.append(text.encode())
    request.outputs.add(name="label")
    raw = stub.ModelInfer(request, timeout=30).raw_output_contents[0]
    size = int.from_bytes(raw[:4], "little")  # before every element
    print(raw[4 : 4 + size].decode())
