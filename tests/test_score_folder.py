"""The folder of the output: what can go wrong with it is one line, and nothing in it is ever half a file."""

import resource
import subprocess
import sys

import pytest

from bundle.errors import DataError
from score import folder
from score.folder import Folder
from tests.score_examples import run, tree, write_csv

LIMIT = 8192  # bytes of a file; the plan is smaller, a part larger


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    columns = {"text": ["the film is good"] * 3000, "id": [f"{number * 7919:x}" for number in range(3000)]}
    return write_csv(tmp_path_factory.mktemp("data") / "texts.csv", columns)


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_a_disk_that_is_full_is_one_line(mood, texts, tmp_path, form):
    """What is half-written is removed; with more room the same command goes on."""
    out = tmp_path / "out"
    options = ["--keep", "id", "--format", form, "--processes", "1", "--threads", "1", "--unit-rows", "1500"]
    ran = subprocess.run(
        [sys.executable, "-m", "edgeward", "score", mood, texts, "--out", out, *options],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
    )
    left = set(tree(out))
    result = run(mood, texts, out=out, keep=("id",), format=form, unit_rows=1500)

    assert ran.returncode == 1
    (line,) = [line for line in ran.stderr.splitlines() if "settings" not in line]
    assert line == f"edgeward: {out} cannot be written: File too large. What is there stays, and the same command " + (
        "goes on from it."
    )
    assert left == {"_plan.json"}
    assert (result.parts, result.missing) == (2, 0)


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_the_place_of_the_folder_is_named(mood, texts, tmp_path, below):
    """Also where it stands in the way of the folder."""
    (tmp_path / "out").write_text("mine")

    with pytest.raises(DataError, match=r"out\S* cannot be used as a folder: Not a directory\."):
        run(mood, texts, out=f"{tmp_path}/out{below}")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_copy_that_stops_half_way_has_no_name(tmp_path, monkeypatch):
    """Where fsspec writes a file bit by bit, it is a draft until it is whole."""
    pytest.importorskip("fsspec")
    there = Folder(f"file://{tmp_path}/out")
    copy = folder.fs.copy_files

    def copy_half(source, target, **options):
        with open(source, "r+b") as file:
            file.truncate(3)
        copy(source, target, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder.fs, "copy_files", copy_half)
        with pytest.raises(KeyboardInterrupt):
            there.write("part-0.csv", b"whole")
    left = [path.name for path in (tmp_path / "out").iterdir()]
    there.write("part-0.csv", b"whole")

    assert [name.startswith(".part-0.csv.tmp-") for name in left] == [True]
    assert there.names() == {"part-0.csv"}
    assert there.read("part-0.csv") == b"whole"
    there.sweep()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-0.csv"]
