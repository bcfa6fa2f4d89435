"""What the peers' servers share. Each is started as: python serve_NAME.py MODEL.onnx PORT THREADS

They listen on loopback, call the model by its file's name, and may write to the working directory, which is theirs.
"""

import socket
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime


class Task(NamedTuple):
    model: str  # its path
    name: str
    port: int
    threads: int


def task() -> Task:
    """What the command line asks for."""
    model, port, threads = sys.argv[1:]
    return Task(model, Path(model).stem, int(port), int(threads))


class Model:
    """A session with the same options for all of them; of a graph with one input and one output, both float32."""

    def __init__(self, path: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (self.given,), (self.answer,) = self.session.get_inputs(), self.session.get_outputs()
        self._name = self.given.name

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of one example; the first axis is the batch."""
        return (1, *self.given.shape[1:])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self._name: x})[0]


def free_port() -> int:
    """For what a server listens on besides, and nobody asks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
