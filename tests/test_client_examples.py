"""The programs of examples/clients: what a user of another client would write gets the label that the bundle gives."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serve.client import Client
from serve.server import ServeConfig, start
from tests.certificates import write_certificates
from tests.serve_bundles import identity, write_text_bundle

CLIENTS = Path(__file__).parents[1] / "examples" / "clients"
TEXT = "the film is né good"
UNREACHABLE = "ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ENETUNREACH|ETIMEDOUT"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    bundle = write_text_bundle(tmp_path_factory.mktemp("models") / "mood")
    server = start(ServeConfig(paths=(bundle,), port=0, device="cpu", threads=1))
    yield server
    server.stop(drain_s=0)


@pytest.fixture(scope="module")
def packages(request):
    """The Node.js packages of the lock file, below pytest's cache: fetched once."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    lock = (CLIENTS / "node" / "package-lock.json").read_bytes()
    folder = Path(request.config.cache.mkdir(f"node-{hashlib.sha256(lock).hexdigest()[:16]}"))
    if not (folder / "complete").exists():
        _install(folder)
        (folder / "complete").touch()
    return folder / "node_modules"


def _install(folder):
    for name in ("package.json", "package-lock.json"):
        shutil.copy(CLIENTS / "node" / name, folder)
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--fetch-retries=0"]
    done = subprocess.run(["npm", "ci", *options], cwd=folder, capture_output=True, text=True)
    if done.returncode and (reason := re.search(UNREACHABLE, done.stderr)):
        pytest.skip(f"npm does not reach its registry: {reason[0]}")
    assert done.returncode == 0, done.stderr


def label(server):
    with Client(server.address) as client:
        return client.predict("mood", [TEXT])["label"][0, 0].decode()


def ask(program, server, model="mood", **environment):
    return subprocess.run(
        [*program, server.address, model, TEXT], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("name", ["with_tritonclient.py", "with_stubs.py"])
def test_a_python_program_prints_the_label(server, name):
    """Triton's client, and generated code alone."""
    done = ask([sys.executable, CLIENTS / name], server)

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{label(server)}\n", "")


def test_a_node_program_prints_the_label(server, packages):
    """From our .proto, which it reads when it starts."""
    done = ask(["node", CLIENTS / "node" / "client.js"], server, NODE_PATH=str(packages))

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{label(server)}\n", "")


def test_a_node_program_is_told_what_is_wrong(server, packages):
    """Our status and words arrive there as anywhere."""
    done = ask(["node", CLIENTS / "node" / "client.js"], server, model="other", NODE_PATH=str(packages))

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "5 NOT_FOUND: Request for unknown model: 'other' is not found\n"


def test_the_snippets_of_the_page_run(tmp_path):
    """docs/clients.md, in its order, with the models and files that it speaks of."""
    page = (CLIENTS.parents[1] / "docs" / "clients.md").read_text()
    models, graph = tmp_path / "models", tmp_path / "models" / "adder" / "1"
    write_text_bundle(models / "tweets" / "1", name="tweets")
    graph.mkdir(parents=True)
    (graph / "model.onnx").write_bytes(identity(np.float32, [None, 2]))
    files = write_certificates(tmp_path / "certificates")
    server = start(ServeConfig((models,), port=0, device="cpu", threads=1, shared_memory=True))
    snippets = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    program = "\n".join(snippets).replace("127.0.0.1:8001", server.address)
    try:
        done = subprocess.run([sys.executable, "-c", program], cwd=files, capture_output=True, text=True)
    finally:
        server.stop(drain_s=0)

    assert done.returncode == 0, done.stderr
    assert "INVALID_ARGUMENT" in done.stdout
    assert len(snippets) == 7
