"""`edgeward serve`."""

from typing import Annotated

from cyclopts import Parameter

from serve import logs
from serve.config import ServeConfig
from serve.server import serve as run_server


def serve(config: Annotated[ServeConfig, Parameter(name="*")]) -> None:
    """Answer gRPC calls until SIGTERM or Ctrl-C, then drain.

    Args:
        config: see ServeConfig.
    """
    logs.configure(requests=config.log_requests)
    run_server(config)
