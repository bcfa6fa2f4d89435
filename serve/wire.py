"""What every transport needs to know of gRPC and of the protocol: methods, limits, messages."""

from grpc_health.v1 import health_pb2

from bundle.errors import BadInput
from protos import inference_pb2 as pb
from serve.config import ServeConfig
from serve.envelope import varint
from serve.errors import DeadlineExceeded, StartError
from serve.service import status

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"  # which is imported for those who ask
REFLECTED = (SERVICE.full_name, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, _REFLECTION)
REFLECTION = f"/{_REFLECTION}/ServerReflectionInfo"
BLOCKING = {"RepositoryModelLoad", "RepositoryModelUnload"}  # all others answer from memory
ENDS = "triton_grpc_error"  # metadata: an error ends the stream, as its status

WINDOW = 64  # requests of one stream that are in work; more are not read
RECEIVE_S = 60  # in which a request has to arrive
END_S = 2.0  # for what cannot be stopped to end by itself, when a server has

_ANSWER = bytes([2 << 3 | 2])  # the tag of infer_response
_LAST: bytes = pb.ModelInferResponse(
    parameters={"triton_final_response": pb.InferParameter(bool_param=True)}
).SerializeToString()  # wherever it stands in an answer

_OPTIONS = {
    "grpc.max_concurrent_streams": 1024,  # of a connection; more calls wait at the client
    "grpc.max_allowed_incoming_connections": 1024,
    "grpc.server_handshake_timeout_ms": 10_000,
    "grpc.keepalive_time_ms": 60_000,  # a peer that is gone is found within 80 seconds, not two hours
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,  # clients that ping oftener are sent away
}


def options(config: ServeConfig) -> list[tuple[str, int]]:
    """Of the gRPC server."""
    limits = {
        "grpc.so_reuseport": int(config.processes > 1),  # else a port that is taken is an error
        "grpc.max_receive_message_length": config.max_message_bytes,
        "grpc.max_send_message_length": config.max_message_bytes,
    }
    return list((limits | _OPTIONS).items())


def no_request() -> BadInput:
    """The client ended its side of a call without a message."""
    return BadInput("the call ended without a request; expected one.")


def late_request() -> DeadlineExceeded:
    """RECEIVE_S have passed."""
    return DeadlineExceeded(f"the request did not arrive within {RECEIVE_S:.0f} seconds.")


def not_bound(address: str) -> StartError:
    """Nothing can listen on an address."""
    return StartError(
        f"{address} cannot be bound: the port is taken, or not allowed, or the host is not this machine's. Choose "
        "another --port; 0 takes any that is free."
    )


def streamed(answer: bytes) -> bytes:
    """An answer on a stream, marked as the only one to its request."""
    return b"".join([_ANSWER, varint(len(answer) + len(_LAST)), answer, _LAST])


def streamed_error(error: Exception, request_id: str) -> bytes:
    """An error on a stream that goes on."""
    answer = pb.ModelStreamInferResponse(
        error_message=status(error)[1], infer_response=pb.ModelInferResponse(id=request_id)
    )
    data: bytes = answer.SerializeToString()
    return data
