"""`edgeward serve` read without cyclopts means what cyclopts makes of it."""

import subprocess
import sys

import cyclopts
import pytest

from edgeward import plain
from edgeward.commands import app

PLAIN = [
    "models",
    "a b --port 5",
    "--port=5 a",
    "a --watch --admin --drain-s 2.5",
    "a --watch=true --shared-memory=false",
    "a --watch true",
    "a --transport asyncio --device=cpu --versions 1,3",
    "a --threads 2 --max-batch=8 --max-delay-ms 1e-3",
    "a --socket null --otlp null --host null",
    "a --socket= --versions=",
    "a=b --host=a=b",
    "a --max-bytes 9999999999999",
]
ASKED = [
    "",
    "--help",
    "a --help",
    "--watch",
    "a --bogus 3",
    "a --port",
    "a --port --watch",
    "a --port 1e3",
    "a --port 5.5",
    "a --port 0x10",
    "a --port 1_000",
    "a --port ５",
    "a --port=",
    "a --port true",
    "a --port -5",
    "a --port 5 --port 6",
    "a --watch --watch",
    "a --watch=perhaps",
    "a --no-watch",
    "a --max-delay-ms null",
    "a --max_batch 3",
    "a --transport ASYNCIO",
    "a --batch-sizes 1 --batch-sizes 8",
    "--paths a",
    "a -- --b",
    "- a",
]


def asked(words):
    """What cyclopts makes of the arguments; None when it refuses them, or shows help."""
    try:
        _, bound, _ = app.parse_args(["serve", *words], exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError:
        return None
    return bound.arguments.get("config")


@pytest.mark.parametrize("line", PLAIN)
def test_plain_options_mean_the_same(line):
    """Nobody can tell by the options who has read them."""
    config = plain.read(line.split())

    assert config is not None
    assert config == asked(line.split())


@pytest.mark.parametrize("line", ASKED)
def test_what_is_not_plain_is_left_to_cyclopts(line):
    """Help, mistakes and other ways to write a value: there is one place that explains them."""
    assert plain.read(line.split()) is None


def test_a_server_imports_only_what_it_needs(tmp_path):
    """Neither the parser, nor what prints its help, nor what few clients ask for is in memory while a server runs."""
    program = (
        "import sys; from edgeward.__main__ import run; code = run(sys.argv[1:]); "
        "print(code, *{'cyclopts', 'attrs', 'rich', 'grpc_reflection.v1alpha', 'tempfile'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", program, "serve", str(tmp_path / "missing.onnx"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["1"]
