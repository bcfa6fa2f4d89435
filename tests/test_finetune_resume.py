"""A training that was killed and resumed ends as one that was not, bit for bit; what can be wrong with a state."""

import json
import multiprocessing
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bundle.errors import CheckpointError, EdgewardError
from finetune.loop import fit
from finetune.resume import Progress, State
from tests.finetune_loops import (
    CPU,
    RECIPE,
    VECTOR,
    objective,
    train_pictures,
    train_pictures_on_a_full_disk,
    vector_network,
    vectors,
    write_pictures,
)

SGD = replace(RECIPE, epochs=6, optimizer="sgd", accumulate=2, mixup=0.3, save_steps=1, batch_size=4, patience=4)
ADAMW = replace(RECIPE, epochs=4, ema=0.9, save_steps=2, batch_size=4, schedule="cosine", precision="bf16")
FP16 = replace(RECIPE, epochs=4, optimizer="sgd", save_steps=3, batch_size=4, precision="fp16", ema=0.5, mixup=0.2)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.finetune_loops"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def start(function, *arguments):
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    return process


def finish(function, *arguments):
    process = start(function, *arguments)
    process.join(60)
    assert process.exitcode == 0


def newest(progress):
    """The step of the last state, 0 without one."""
    return max((int(path.name) for path in progress.glob("[0-9]*")), default=0)


def kill_after(process, progress, step, delay):
    """Kill a process with SIGKILL some time after it has saved a step; whether it was still at work."""
    deadline = time.monotonic() + 60
    while newest(progress) < step and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -9


def assert_same(one, other):
    """Two results of train_pictures are equal, bit for bit."""
    first, second = load_file(f"{one}.safetensors"), load_file(f"{other}.safetensors")
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    with open(f"{one}.json") as a, open(f"{other}.json") as b:
        assert a.read() == b.read()


@pytest.mark.parametrize("recipe", [SGD, ADAMW, FP16], ids=["sgd", "adamw", "fp16"])
def test_killed_and_resumed_is_the_same(recipe, data, tmp_path):
    """Killed at random steps and resumed, a training gives the weights and the history of one that was let be."""
    finish(train_pictures, data, tmp_path / "whole", None, recipe)
    progress = tmp_path / "progress"
    chance = np.random.default_rng(recipe.save_steps)
    killed = 0
    for _ in range(3):
        process = start(train_pictures, data, tmp_path / "killed", progress, recipe)
        step = newest(progress) + int(chance.integers(1, 6))
        killed += kill_after(process, progress, step, delay=chance.uniform(0, 0.02))
    assert killed
    finish(train_pictures, data, tmp_path / "killed", progress, recipe)

    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_full_disk(data, tmp_path):
    """When a state cannot be written, one error says so, the last state is intact, and it can be resumed from it."""
    finish(train_pictures, data, tmp_path / "whole", None, ADAMW)
    progress = tmp_path / "progress"
    assert kill_after(start(train_pictures, data, tmp_path / "out", progress, ADAMW), progress, 2, 0)
    step = newest(progress)
    finish(train_pictures_on_a_full_disk, data, tmp_path / "out", progress, ADAMW)

    message = (tmp_path / "out.txt").read_text()
    assert f"could not be written to {progress}" in message
    assert f"that of step {step} is still there" in message
    assert "--resume" in message
    assert newest(progress) == step
    assert not (tmp_path / "out.json").exists()
    finish(train_pictures, data, tmp_path / "out", progress, ADAMW)
    assert_same(tmp_path / "whole", tmp_path / "out")


def train(progress, epochs=2, fingerprint="tiny", rows_of_epoch=None):
    network = vector_network()
    examples = vectors(24)
    history = fit(
        network, examples, vectors(10, seed=1), VECTOR, objective(*examples.targets), replace(RECIPE, epochs=epochs),
        CPU, trainable=[name for name, _ in network.named_parameters()], rows_of_epoch=rows_of_epoch,
        progress=Progress(progress, fingerprint, None),
    )  # fmt: skip
    return history, network.state_dict()


def test_one_state_is_kept_and_it_holds_no_pickle(tmp_path):
    """After every epoch there is one state, of two files, and nothing else, though a killed process left something."""
    (tmp_path / "progress" / ".3.xyz").mkdir(parents=True)
    train(tmp_path / "progress")

    assert [path.name for path in (tmp_path / "progress").iterdir()] == ["6"]
    assert sorted(path.name for path in (tmp_path / "progress" / "6").iterdir()) == ["state.json", "state.safetensors"]
    described = json.loads((tmp_path / "progress" / "6" / "state.json").read_text())
    assert (described["format"], described["step"], len(described["history"])) == ("edgeward-training-state", 6, 2)
    names = load_file(tmp_path / "progress" / "6" / "state.safetensors").keys()
    assert {name.partition(":")[0] for name in names} == {
        "model", "best", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step",
    }  # fmt: skip


def test_a_finished_training_is_not_trained_again(tmp_path):
    """Resuming after the last epoch gives the same network and history without a look at the examples."""

    def no_rows(epoch):
        raise AssertionError(epoch)

    history, weights = train(tmp_path / "progress")
    again, same = train(tmp_path / "progress", rows_of_epoch=no_rows)

    assert again == history
    assert not [name for name in weights if not torch.equal(weights[name], same[name])]


def test_the_best_epoch_survives(tmp_path):
    """When the best epoch lay before the state, its weights are those that are kept, as without an interruption."""
    recipe = replace(RECIPE, epochs=8, learning_rate=0.5, schedule="constant", metric="loss")
    examples = vectors(24)

    def interrupted(epoch):
        if epoch == 6:
            raise KeyboardInterrupt
        return examples.rows

    def run(folder, rows_of_epoch=None):
        network = vector_network()
        history = fit(
            network, examples, vectors(10, seed=1), VECTOR, objective(*examples.targets), recipe, CPU,
            trainable=[name for name, _ in network.named_parameters()], rows_of_epoch=rows_of_epoch,
            progress=Progress(tmp_path / folder, "tiny", None),
        )  # fmt: skip
        return history, network.head.weight

    history, weight = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", interrupted)
    again, same = run("stopped")

    assert min(history, key=lambda epoch: epoch["loss"])["epoch"] < 6
    assert again == history
    assert torch.equal(same, weight)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    """A training that is not to be resumed writes no file."""
    monkeypatch.chdir(tmp_path)
    network, examples = vector_network(), vectors(24)
    fit(network, examples, examples, VECTOR, objective(*examples.targets), replace(RECIPE, epochs=1), CPU, trainable=[
        "head.weight"])  # fmt: skip

    assert not list(tmp_path.iterdir())


def test_another_training_is_refused(tmp_path):
    """A state of other options or data is not resumed."""
    train(tmp_path / "progress")
    with pytest.raises(CheckpointError, match=r"progress.6 is the state of another training.*remove"):
        train(tmp_path / "progress", fingerprint="other")


@pytest.mark.parametrize(
    ("file", "data"),
    [("state.safetensors", b"x"), ("state.json", b"{"), ("state.json", b"{}"), ("state.json", None)],
)
def test_damaged_states_are_refused(file, data, tmp_path):
    """A state whose files are not as they were written is one clear error."""
    train(tmp_path / "progress")
    path = tmp_path / "progress" / "6" / file
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"progress.6 is damaged: .*Remove"):
        train(tmp_path / "progress")


def test_a_state_comes_back_as_it_was(tmp_path):
    """Integers, numbers that are none, empty and scalar tensors survive."""
    tensors = {
        "model": {"a.b": torch.randn(3, 2).T, "bf": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer.step": {"a.b": torch.tensor(4.0), "empty": torch.zeros(0)},
    }
    progress = Progress(tmp_path / "progress", "tiny", None)
    progress.save(
        State(7, [0.1, 1e-300], [{"epoch": 1, "r2": float("nan"), "x": 1 / 3}], 1, {"scale": 2.0, "n": 3}, tensors)
    )
    state = progress.load()

    assert (state.step, state.losses, state.best_epoch, state.scaler) == (7, [0.1, 1e-300], 1, {"scale": 2.0, "n": 3})
    assert repr(state.history) == repr([{"epoch": 1, "r2": float("nan"), "x": 1 / 3}])
    assert {kind: list(named) for kind, named in state.tensors.items()} == {
        kind: sorted(named) for kind, named in tensors.items()
    }
    for kind, named in tensors.items():
        for name, tensor in named.items():
            assert torch.equal(state.tensors[kind][name], tensor)


def test_nothing_is_there_at_first(tmp_path):
    """Without a folder, or with one that holds no state, there is nothing to resume."""
    assert Progress(tmp_path / "progress", "tiny", None).load() is None
    (tmp_path / "progress").mkdir()
    assert Progress(tmp_path / "progress", "tiny", None).load() is None


def test_a_folder_that_cannot_be_written(tmp_path):
    """Where no folder can be made, the error says that there is no state."""
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgewardError, match="there is none before it"):
        Progress(tmp_path / "file" / "progress", "tiny", None).save(State(1, [0.0], [], 0, {}, {}))


def test_newest_state_is_taken(tmp_path):
    """When a process was killed before it could remove the state before, the later one counts."""
    train(tmp_path / "progress")
    shutil.copytree(tmp_path / "progress" / "6", tmp_path / "progress" / "10")
    (tmp_path / "progress" / "6" / "state.json").write_text("{")

    assert Progress(tmp_path / "progress", "tiny", None).load().step == 6
