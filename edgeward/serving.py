"""`edgeward serve`."""

from typing import Annotated

from cyclopts import Parameter

from edgeward import plain
from serve.config import ServeConfig


def serve(config: Annotated[ServeConfig, Parameter(name="*")]) -> None:
    """Answer gRPC calls until SIGTERM or Ctrl-C, then drain.

    Args:
        config: see ServeConfig.
    """
    plain.serve(config)
