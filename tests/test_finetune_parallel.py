"""Two processes under torchrun train and measure as one does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune.parallel import World, world
from tests import finetune_parallel
from tests.finetune_parallel import EXACT

LAUNCH = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
          "--local-addr=127.0.0.1"]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder in which one process and two have left what they did."""
    folder = tmp_path_factory.mktemp("parallel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(finetune_parallel.__file__).parents[1]
    command = [sys.executable, *LAUNCH, "-m", "tests.finetune_parallel", str(folder)]
    process = subprocess.Popen(
        command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, stderr = process.communicate(timeout=120)
    finally:
        if process.poll() is None:  # torchrun's own processes do not end with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, stderr[-3000:]
    (folder / "stderr").write_text(stderr)
    threads = torch.get_num_threads()
    finetune_parallel.main(folder)
    torch.set_num_threads(threads)
    return folder


def weights(results, name):
    return load_file(results / f"{name}.safetensors")


def assert_equal(results, one, other):
    first, second = weights(results, one), weights(results, other)
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert (results / f"{one}.json").read_text() == (results / f"{other}.json").read_text()


def test_weights_agree_with_one_process(results):
    """Two processes make the same steps as one, to rounding, with accumulation and batches of odd size."""
    alone, ours = weights(results, "of1-exact.0"), weights(results, "of2-exact.0")
    for name, tensor in alone.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)
    first, second = (json.loads((results / f"{name}.0.json").read_text()) for name in ("of1-exact", "of2-exact"))
    assert len(first) == EXACT.epochs
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_processes_end_with_the_same(results):
    """Both processes have the same weights and history in the end, running means included, and the same again."""
    assert_equal(results, "of2-exact.0", "of2-exact.1")
    assert_equal(results, "of2-whole.0", "of2-whole.1")
    assert_equal(results, "of2-exact.0", "of2-again.0")


def test_resumed_is_the_same(results):
    """Stopped after two of four epochs and resumed by as many processes, the result is bit-equal to that of one go."""
    assert_equal(results, "of2-whole.0", "of2-resumed.0")
    assert_equal(results, "of2-whole.1", "of2-resumed.1")
    assert not (results / "of2-stopped.0.json").exists()


def test_order_is_the_same(results):
    """Process 0 takes the even places of each batch that one process trains on, process 1 the odd ones."""
    alone, zero, one = (
        json.loads((results / f"{name}.seen").read_text()) for name in ("of1-exact.0", "of2-exact.0", "of2-exact.1")
    )
    sizes = [len(batch) for batch in np.array_split(np.arange(31), 7)] * EXACT.epochs
    batches = np.split(np.array(alone), np.cumsum(sizes)[:-1])

    assert len(alone) == 31 * EXACT.epochs
    assert sorted(alone[:31]) == list(range(31))
    assert np.concatenate([batch[0::2] for batch in batches]).tolist() == zero
    assert np.concatenate([batch[1::2] for batch in batches]).tolist() == one


@pytest.mark.parametrize("count", [1, 7, 8])
def test_evaluation_has_every_example_once(count, results):
    """Examples that do not divide by the processes give as many logits, in order, and the same in both."""
    alone = np.load(results / f"of2-logits.{count}.alone.npy")
    zero, one = (np.load(results / f"of2-logits.{count}.{rank}.npy") for rank in (0, 1))

    assert zero.shape == (count, 3)
    np.testing.assert_array_equal(zero, one)
    np.testing.assert_allclose(zero, alone, rtol=1e-5, atol=1e-6)


def test_processes_have_nothing_to_complain_of(results):
    """torch's distributed library warns of nothing."""
    assert "Warning" not in (results / "stderr").read_text()


def test_without_torchrun_a_process_is_alone(monkeypatch):
    """Without torchrun's environment, or with that of one process, there is one process, and no group of them."""
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with world() as ours:
            assert ours == World(0, 1)
            assert not torch.distributed.is_initialized()
