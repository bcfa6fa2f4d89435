"""What `edgeward serve` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bundle.session import Device
from serve.errors import StartError

MOST_THREADS = 1024  # of one run
MOST_INSTANCES = 256  # each is a thread
MOST_DELAY_MS = 60_000

_BOUNDS: dict[str, tuple[float, float]] = {  # what is beyond is a slip of the pen, or no machine has it
    "port": (0, 65535),
    "http_port": (0, 65535),
    "threads": (1, MOST_THREADS),
    "instances": (1, MOST_INSTANCES),
    "max_batch": (1, 1 << 20),
    "max_delay_ms": (0, MOST_DELAY_MS),
    "max_queue": (0, 1 << 20),
    "max_bytes": (1, 1 << 50),
    "max_message_bytes": (1, (1 << 31) - 1),  # gRPC knows no larger one
    "max_streams": (0, 1 << 20),
    "gpu_memory_bytes": (1, 1 << 50),
    "processes": (1, 256),
    "drain_s": (0, 86_400),
}


@dataclass(frozen=True)
class ServeConfig:
    """Options of `edgeward serve`."""

    paths: tuple[Path, ...]
    """Bundles, folders of bundles, repositories NAME/VERSION/, or .onnx files."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network that this machine is in."""
    port: int = 8001
    """Port to listen on; 0 takes any that is free."""
    socket: Path | None = None
    """Unix-domain socket to listen on instead of host and port."""
    transport: Literal["auto", "completion-queue", "asyncio"] = "auto"
    """How gRPC is spoken: on its completion queue, which is faster, or by its asyncio server. auto takes the first
    where the installed grpcio has it, and logs which."""
    http_port: int | None = None
    """Port for /metrics, /livez and /readyz, on the same host; 0 takes any that is free. By default there is none."""
    device: Device = "auto"
    """auto takes CUDA where it works, else the CPU, and logs which."""
    threads: int | None = None
    """Of one run on the CPU; by default those that the bundle was measured with, else all cores of this process."""
    instances: int | None = None
    """Runs of one model at the same time; by default as many as the cores allow with these threads."""
    max_batch: int | None = None
    """Rows that requests are joined to in one run; 1 joins none. By default 64, and 1 where answers depend on it;
    on the CPU only requests that each take less than about a millisecond are joined unless a number is given."""
    max_delay_ms: float = 0.0
    """How long a request may wait for others to join it."""
    batch_sizes: tuple[int, ...] = ()
    """Row counts that joined runs are padded to."""
    max_queue: int = 256
    """Requests that may wait for one model; one more is UNAVAILABLE."""
    max_bytes: int = 1 << 30
    """Bytes of requests in work; beyond them a request is RESOURCE_EXHAUSTED."""
    max_message_bytes: int = 64 << 20
    """Largest request, and largest answer."""
    max_streams: int = 64
    """ModelStreamInfer calls at the same time; one more is RESOURCE_EXHAUSTED."""
    versions: str = "latest"
    """Which versions of a model are served: latest, latest:N, all, or numbers such as 1,3."""
    watch: bool = False
    """Serve new versions as they appear on disk, and drop those that went."""
    require_gate: bool = False
    """Refuse what no accuracy gate has passed."""
    admin: bool = False
    """Let clients load and unload models and change what is logged."""
    shared_memory: bool = False
    """Let clients on this machine pass tensors in shared memory."""
    tls_cert: Path | None = None
    """PEM certificate chain of the server; with --tls-key."""
    tls_key: Path | None = None
    """PEM private key of the server."""
    tls_client_ca: Path | None = None
    """PEM certificates of those who sign the clients' certificates; then every client needs one."""
    token_file: Path | None = None
    """Bearer tokens that may call, one a line."""
    admin_token_file: Path | None = None
    """Bearer tokens that may call what --admin allows, one a line."""
    gpu_memory_bytes: int | None = None
    """Most that one model may take on a GPU."""
    otlp: str | None = None
    """Traces of every call go to this OpenTelemetry collector, such as http://127.0.0.1:4317."""
    log_requests: bool = False
    """Log a line for every call."""
    processes: int = 1
    """Servers on the same port; the kernel gives each connection to one of them."""
    drain_s: float = 30.0
    """Seconds that running calls may go on when the server stops."""

    def __post_init__(self) -> None:
        """Look at the numbers, and at options that contradict each other.

        Raises:
            StartError: one cannot be met.
        """
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise StartError(f"--{name.replace('_', '-')} is {value}; expected {least} to {most}.")
        if any(size < 1 for size in self.batch_sizes):
            raise StartError(f"--batch-sizes are {', '.join(map(str, self.batch_sizes))}; expected 1 or more.")
        if self.device == "cpu" and self.gpu_memory_bytes is not None:
            raise StartError(
                f"--gpu-memory-bytes {self.gpu_memory_bytes} limits what is taken on a GPU, and --device cpu uses none."
                " Leave out one of them; the memory of the process is limited from outside."
            )
