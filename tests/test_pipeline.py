"""From a folder of files to an RPC answer, through the command line that people type."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bundle.model import load_model
from tests.finetune_examples import write_digits, write_factory

EDGEWARD = str(Path(sys.executable).with_name("edgeward"))


def edgeward(*arguments, check=0):
    """Run the command; its stdout and stderr."""
    done = subprocess.run([EDGEWARD, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == check, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def serving():
    """Start `edgeward serve` on a free port; gives its address."""
    started = []

    def start(*paths):
        server = subprocess.Popen(
            [EDGEWARD, "serve", *map(str, paths), "--port", "0"], stderr=subprocess.PIPE, text=True
        )
        started.append(server)
        for line in server.stderr:
            found = re.search(r'"address": "([^"]+)"', line)
            if found:
                return found[1]
        pytest.fail("the server did not start")

    yield start
    for server in started:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        server.stderr.close()


def test_four_commands_from_images_to_an_answer(tmp_path, serving):
    """finetune, export, serve, infer: every stage takes what the one before it wrote, and says so in JSON."""
    data, factory = write_digits(tmp_path / "digits", 400), write_factory(tmp_path)
    out, _ = edgeward(
        *("finetune", f"python:{factory}:tiny", data, "--out", tmp_path / "checkpoint", "--json"),
        *("--split", 0.4, 0.1, 0.2, 0.3),
    )
    trained = json.loads(out)
    assert trained["out"] == str(tmp_path / "checkpoint")
    assert trained["metrics"]["accuracy"] > 0.5  # random features of a convolution, a fitted head; chance is 0.1

    out, log = edgeward("export", tmp_path / "checkpoint", "--out", tmp_path / "digits-1", "--name", "digits", "--json")
    report = json.loads(out)
    assert report["pytorch"]["accuracy"] == pytest.approx(report["served"]["accuracy"], abs=0.02)
    assert "candidate" in log

    image = next((data / "7").glob("*.png"))
    out, _ = edgeward("infer", serving(tmp_path / "digits-1"), "digits", image, "--json")
    answer = json.loads(out)
    expected = load_model(tmp_path / "digits-1", device="cpu").predict([image.read_bytes()])
    assert answer["label"] == [[expected["label"][0, 0].decode()]]
    np.testing.assert_array_equal(np.array(answer["logits"], np.float32), expected["logits"])

    shown, _ = edgeward("inspect", tmp_path / "digits-1")
    assert "digits version 1" in shown
    assert report["shipped"] in shown
    verified, _ = edgeward("verify", tmp_path / "digits-1")
    assert "8 golden examples reproduced" in " ".join(verified.split())


def test_raw_text_is_answered_as_the_bundle_answers(text_bundle, serving):
    """Texts of several lengths, one of them empty, in one call: labels and scores are the bundle's, bit for bit."""
    texts = ["I love this", "", "why is it so slow? " * 20, "早上好 ☀"]
    out, _ = edgeward("infer", serving(text_bundle), "tweets", *texts, "--json")
    answer = json.loads(out)
    expected = load_model(text_bundle, device="cpu").predict([text.encode() for text in texts])

    assert [row[0] for row in answer["label"]] == [label.decode() for label in expected["label"][:, 0]]
    np.testing.assert_array_equal(np.array(answer["logits"], np.float32), expected["logits"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["verify", "nowhere"], 1, "edgeward: nowhere is not a bundle: it has no manifest.json."),
        (["export", "nowhere", "--out", "b"], 1, "edgeward: nowhere is not a checkpoint"),
        (["finetune", "torchvision:resnet18", "nowhere", "--out", "c", "--weights", "none"], 1, "there is no dataset"),
        (["finetune", "bert", "nowhere", "--out", "c"], 1, "'bert' is not a model: give transformers:ID_OR_DIR"),
        (["serve", "nowhere"], 1, "nowhere"),
        (["infer", "127.0.0.1:1", "m", "x", "--timeout-s", "2"], 1, "UNAVAILABLE"),
        (["export"], 2, "--checkpoint requires an argument"),
        (["finetune", "m", "d", "--out", "c", "--strategy", "magic"], 2, "magic"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_wrong_use_is_one_clear_message(arguments, code, message, tmp_path, monkeypatch):
    """Exit 1 for our errors and 2 for usage, the reason on stderr, no traceback, nothing on stdout."""
    monkeypatch.chdir(tmp_path)
    out, log = edgeward(*arguments, check=code)

    assert message in " ".join(log.split()).replace("│ ", "")
    assert "Traceback" not in log
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_damaged_bundle_is_not_served(text_bundle, tmp_path):
    """One flipped bit in the graph: neither verified nor served."""
    import shutil

    shutil.copytree(text_bundle, tmp_path / "b")
    graph = tmp_path / "b" / "model.int8-dynamic.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)

    for command in ("verify", "inspect", "serve"):
        _, log = edgeward(command, tmp_path / "b", check=1)
        assert "sha256 differs" in log


def test_gate_failure_exits_with_3(unproved_checkpoint, tmp_path):
    """A variant asked for by name that cannot be proved: exit 3, and no bundle."""
    arguments = ["--variant", "int8-static", "--max-drop", "0.01", "--report", tmp_path / "report.json"]
    _, log = edgeward("export", unproved_checkpoint, "--out", tmp_path / "b", *arguments, check=3)

    assert "No bundle was written" in log
    assert not (tmp_path / "b").exists()
    assert json.loads((tmp_path / "report.json").read_bytes())["gate"][0]["verdict"] != "PASS"


def test_interrupted_training_can_go_on(tmp_path):
    """Ctrl-C: exit 130, no half-written checkpoint, and beside it what --resume needs."""
    data, factory = write_digits(tmp_path / "digits", 600), write_factory(tmp_path)
    command = [
        "finetune",
        f"python:{factory}:tiny",
        data,
        "--out",
        tmp_path / "c",
        "--strategy",
        "full",
        "--epochs",
        "500",
    ]
    process = subprocess.Popen(
        [EDGEWARD, *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits SIG_IGN
    )
    epochs = (line for line in process.stderr if "epoch done" in line)
    assert next(epochs)
    assert next(epochs)  # the first is saved by now
    process.send_signal(signal.SIGINT)
    log = process.stderr.read()
    process.stderr.close()

    assert process.wait(60) == 130
    assert "interrupted" in log
    assert "Traceback" not in log
    assert "--resume" in log
    assert sorted(os.listdir(tmp_path)) == ["c.progress", "digits", "tiny_models.py"]
    _, log = edgeward(*command, check=1)
    assert "holds an unfinished training" in log


def test_help_is_quick_and_complete():
    """Every command is listed, without importing what any of them needs."""
    program = "import sys; from edgeward.__main__ import run; run(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    for command in ("finetune", "export", "serve", "infer", "inspect", "verify"):
        assert command in done.stdout
