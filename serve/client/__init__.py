"""Clients of the protocol: raw examples or tensors to a server, answers back. grpcio, protobuf and numpy are enough."""

from serve.client.aio import AioClient
from serve.client.blocking import Client
from serve.client.calls import Class, Health
from serve.client.channel import Tls
from serve.client.columns import ModelMetadata
from serve.client.region import Region, SharedTensor

__all__ = ["AioClient", "Class", "Client", "Health", "ModelMetadata", "Region", "SharedTensor", "Tls"]
