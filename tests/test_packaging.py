"""What an edge box gets: the wheel alone, in a fresh environment, serves."""

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bundle.model import load_model

ROOT = Path(__file__).parents[1]
PACKAGES = {"bundle", "edgeward", "export", "finetune", "protos", "score", "serve"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The distribution's wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    return next(folder.glob("edgeward-*.whl"))


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    """No test, example or document is installed into anybody's site-packages; types and licence are."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}

    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_top_level_names_are_ours():
    """The packages have common names; no other distribution of this environment may claim one."""
    owners = importlib.metadata.packages_distributions()
    assert {name: set(owners.get(name, ["edgeward"])) for name in PACKAGES} == {key: {"edgeward"} for key in PACKAGES}


def test_changelog_knows_the_version():
    """A release has its heading."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]

    assert version == importlib.metadata.version("edgeward")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


CLIENT = """
import json, subprocess, sys
server = subprocess.Popen([sys.argv[1], "serve", sys.argv[2], "--port", "0"], stderr=subprocess.PIPE, text=True)
address = next(json.loads(line)["address"] for line in server.stderr if '"event": "ready"' in line)
command = [sys.argv[1], "infer", address, "tweets", "what a day", "--json"]
done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
server.terminate()
print(json.dumps({"answer": json.loads(done.stdout), "code": server.wait(60)}))
"""


def test_wheel_alone_serves(wheel, text_bundle, tmp_path):
    """A fresh environment with the wheel and a runtime, away from the sources and without torch, answers a call."""
    import json
    import venv

    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / "bin"
    environment = {**os.environ, "PYTHONPATH": ""}
    install = [binaries / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]"]
    subprocess.run(install, check=True, cwd=tmp_path, env=environment)
    probe = "import importlib.util as u, bundle; print(bundle.__file__, u.find_spec('torch'), u.find_spec('onnx'))"
    found = subprocess.run(
        [binaries / "python", "-c", probe], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    ).stdout
    assert found.startswith(str(tmp_path))
    assert found.endswith("None None\n")

    done = subprocess.run(
        [binaries / "python", "-c", CLIENT, binaries / "edgeward", text_bundle],
        check=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    expected = load_model(text_bundle, device="cpu").predict([b"what a day"])
    assert result["code"] == 0
    assert result["answer"]["label"] == [[expected["label"][0, 0].decode()]]


def test_missing_runtime_names_the_extra_that_brings_it():
    """Without onnxruntime the error says which extras there are; without torch, finetune says the same."""
    for module, command in (("onnxruntime", "verify x"), ("torch", "finetune a b --out c")):
        program = (
            f"import sys; sys.modules[{module!r}] = None\n"
            f"from edgeward.__main__ import run; sys.exit(run({command.split()}))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

        assert done.returncode == 1
        assert "edgeward with" in done.stderr
        assert "'cpu'" in done.stderr
        assert "Traceback" not in done.stderr
