"""A command line that is wrong, and one whose command is not installed here."""

import subprocess
import sys

import pytest
from PIL import Image

from tests.serve_bundles import write_image_bundle

EDGE = """
import sys
for name in ("torch", "onnx", "pyarrow"):
    sys.modules[name] = None
from edgeward.__main__ import run
sys.exit(run(sys.argv[1:]))
"""


def on_an_edge_box(line):
    """A command line where neither what trains nor what scores files is installed."""
    return subprocess.run([sys.executable, "-c", EDGE, *line.split()], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("srve model.onnx", "There is no command 'srve'. The commands are finetune, export, serve, "),
        ("--hlep", "There is no command '--hlep'."),
        ("--help srve", "There is no command 'srve'."),
        ("serve model.onnx --bogus 3", "Unknown option: --bogus."),
        (
            "infer localhost:1 model x --timeout 1",
            "There is no option '--timeout'. A text that begins so can be read from a file or stdin.",
        ),
        ("verify bundle --device gpu", 'Choose from: "auto", "cpu", "cuda", "tensorrt".'),
    ],
)
def test_a_wrong_command_line_is_said_in_one_whole_line(line, says):
    """Whatever is installed, and however narrow the terminal is."""
    done = on_an_edge_box(line)

    assert done.returncode == 2
    assert done.stderr.startswith("edgeward: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("finetune model data --out out", "torch is not installed."),
        ("score bundle texts.csv --out out", "pyarrow is not installed. Install edgeward with its extra 'score'."),
    ],
)
def test_a_command_that_is_not_installed_names_what_is_missing(line, says):
    """In one line."""
    done = on_an_edge_box(line)

    assert done.returncode == 1
    assert done.stderr.startswith(f"edgeward: {says}")
    assert done.stderr.count("\n") == 1


def test_score_explains_itself_wherever_it_cannot_run():
    """Its help needs no library that reads files."""
    done = on_an_edge_box("score --help")

    assert done.returncode == 0
    assert "Score files of any size, every row exactly once." in done.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_an_image_with_too_many_pixels_is_told_of_once(tmp_path, processes):
    """In its row, or its call; not by Pillow as well, on two lines that are no log, in this or another process."""
    bundle = write_image_bundle(tmp_path / "colour")
    images, options = tmp_path / "images", ["--unit-rows", "1", "--processes", str(processes)]
    images.mkdir()
    for name in ("a", "b"):
        Image.new("1", (10_000, 9_000)).save(images / f"{name}.png")
    command = [sys.executable, "-m", "edgeward", "score", bundle, images, "--out", tmp_path / "out", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert "2 rows in 2 parts, 2 of them bad" in done.stdout
    assert "Warning" not in done.stderr
