"""`edgeward serve` and `edgeward infer`."""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from rich.table import Table

from edgeward.result import give
from serve.client import Client
from serve.server import ServeConfig
from serve.server import serve as run_server

MOST_VALUES = 4  # of one output that the table shows; --json gives all


def serve(config: Annotated[ServeConfig, Parameter(name="*")]) -> None:
    """Answer gRPC calls until SIGTERM or Ctrl-C, then drain.

    Args:
        config: see ServeConfig.
    """
    run_server(config)


def infer(address: str, model: str, inputs: tuple[str, ...], *, timeout_s: float = 30.0, json: bool = False) -> None:
    """Send raw examples to a running server.

    Args:
        address: HOST:PORT.
        model: name that it is served under.
        inputs: each the path of a file, "-" for stdin, or else the text itself.
        timeout_s: of the call, in seconds.
        json: give the answers as one JSON object.
    """
    with Client(address, timeout_s=timeout_s) as client:
        answers = client.predict(model, [_raw(value) for value in inputs])
    table = Table()
    table.add_column("input")
    for name in answers:
        table.add_column(name)
    for row, value in enumerate(inputs):
        table.add_row(value, *(_cell(array[row]) for array in answers.values()))
    give(answers, table, json=json)


def _raw(value: str) -> bytes:
    if value == "-":
        return sys.stdin.buffer.read()
    try:
        is_file = Path(value).is_file()
    except OSError:  # a long text is not a path
        is_file = False
    return Path(value).read_bytes() if is_file else value.encode()


def _cell(values: np.ndarray) -> str:
    if len(values) > MOST_VALUES:
        return f"{values.max():.4g} (highest of {len(values)})"
    return " ".join(v.decode(errors="replace") if isinstance(v, bytes) else f"{v:.4g}" for v in values.tolist())
