from pathlib import Path

import pytest

from serve.config import ServeConfig
from serve.errors import StartError


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("threads", 0, "--threads is 0; expected 1 to 1024"),
        ("instances", 257, "--instances is 257; expected 1 to 256"),
        ("max_batch", 0, "--max-batch is 0"),
        ("max_delay_ms", float("nan"), "--max-delay-ms is nan; expected 0 to 60000"),
        ("max_delay_ms", -1.0, "--max-delay-ms is -1.0"),
        ("max_message_bytes", 1 << 31, "--max-message-bytes is 2147483648; expected 1 to 2147483647"),
        ("max_bytes", 0, "--max-bytes is 0"),
        ("gpu_memory_bytes", 0, "--gpu-memory-bytes is 0"),
        ("processes", 0, "--processes is 0; expected 1 to 256"),
        ("port", 70_000, "--port is 70000; expected 0 to 65535"),
        ("http_port", -1, "--http-port is -1"),
        ("drain_s", float("inf"), "--drain-s is inf"),
        ("batch_sizes", (4, -3), "--batch-sizes are 4, -3; expected 1 or more"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused(option, value, said):
    """Also one that would start so many threads or processes that the machine stands still."""
    with pytest.raises(StartError, match=said):
        ServeConfig((Path("model.onnx"),), **{option: value})


def test_what_is_left_out_is_no_number():
    config = ServeConfig((Path("model.onnx"),), max_queue=0, max_streams=0, drain_s=0.0, port=0)

    assert (config.threads, config.instances, config.http_port) == (None, None, None)
