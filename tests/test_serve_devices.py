"""What `edgeward serve` makes of --device, --gpu-memory-bytes and --batch-sizes."""

import numpy as np
import pytest
from onnxruntime import get_available_providers

import bundle.model
import serve.loading
from bundle.log import captured
from serve.config import ServeConfig
from serve.errors import StartError
from serve.repository import open_repository
from tests.serve_bundles import identity, write_image_bundle

no_gpu = pytest.mark.skipif("CUDAExecutionProvider" in get_available_providers(), reason="there may be a GPU")


@pytest.fixture
def paths(tmp_path):
    """A bundle and a plain graph."""
    write_image_bundle(tmp_path / "colour")
    (tmp_path / "same.onnx").write_bytes(identity(np.float32, [None, 2]))
    return tmp_path / "colour", tmp_path / "same.onnx"


def test_a_limit_for_a_gpu_that_is_not_to_be_used_is_refused(paths):
    """Two options that contradict each other keep the server from starting."""
    with pytest.raises(StartError, match=r"--gpu-memory-bytes 1000 .* --device cpu uses none"):
        open_repository(ServeConfig(paths, device="cpu", gpu_memory_bytes=1000))


@no_gpu
def test_a_limit_that_limits_nothing_is_told(paths):
    """Where auto takes the CPU the log says for each model that there is no GPU memory to limit."""
    with captured() as logs:
        repository = open_repository(ServeConfig(paths, threads=1, gpu_memory_bytes=1 << 30))

    told = {line["model"] for line in logs if line["event"] == "no GPU memory to limit"}
    assert told == {"colour", "same"}
    assert repository.close(0)


def test_bundles_and_graphs_are_started_with_limit_and_sizes(paths, monkeypatch):
    """What the command was told about the GPU reaches every session."""
    asked = []

    class Asked(serve.loading.Session):
        def __init__(self, graph, *, device, threads, gpu_memory_bytes, batch_sizes):
            asked.append((gpu_memory_bytes, tuple(batch_sizes)))
            super().__init__(graph, device="cpu", threads=threads)

    monkeypatch.setattr(bundle.model, "Session", Asked)
    monkeypatch.setattr(serve.loading, "Session", Asked)
    open_repository(ServeConfig(paths, threads=1, gpu_memory_bytes=1 << 30, batch_sizes=(4, 2))).close(0)

    assert asked == [(1 << 30, (4, 2))] * 2
