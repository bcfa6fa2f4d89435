"""The wire: inference.proto and the code generated from it, both committed.

Regenerate with `make protos`, which runs
`python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. protos/inference.proto`
with the oldest grpcio-tools whose code every supported protobuf accepts (pyproject.toml pins it).
"""
