import os
from pathlib import Path

import pytest

from bundle.errors import DataError, MissingExtra
from score.files import beside, find_inputs, open_file, version_of


@pytest.fixture
def data(tmp_path):
    """Files of several kinds, at several depths."""
    names = ["b.csv", "a.parquet", "deep/c.jsonl", "deep/deeper/d.csv", "e.npz", ".hidden.csv", "_temporary/f.csv"]
    for name in [*names, "notes.md"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def found(*arguments, images=False, below=None):
    paths = [each.file.path for each in find_inputs(list(map(str, arguments)), images=images)]
    return [str(Path(path).relative_to(below)) for path in paths] if below else paths


def test_a_folder_is_every_file_that_can_be_scored(data):
    """At any depth, sorted, without what begins with a dot or an underscore."""
    assert found(data, below=data) == ["a.parquet", "b.csv", "deep/c.jsonl", "deep/deeper/d.csv", "e.npz"]


def test_what_is_written_is_no_input(data):
    """The output may lie in the folder that is scored, and the next run finds the same input there."""
    (data / "deep" / "out").mkdir()
    (data / "deep" / "out" / "part-000000-000000.csv").write_text("x")
    (data / "deep" / "output.csv").write_text("x")
    kept = find_inputs([str(data / "deep"), str(data / "**/*.csv")], images=False, out=str(data / "deep" / "out"))

    names = [Path(each.file.path).name for each in kept]
    assert names == ["f.csv", "b.csv", "c.jsonl", "d.csv", "output.csv"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.csv", ["b.csv"]),
        ("*/*.jsonl", ["deep/c.jsonl"]),
        ("**/*.csv", ["_temporary/f.csv", "b.csv", "deep/deeper/d.csv"]),
        ("[ab].*", ["a.parquet", "b.csv"]),
        ("deep/**/d.csv", ["deep/deeper/d.csv"]),
        ("deep/**/c.jsonl", ["deep/c.jsonl"]),
        ("?.csv", ["b.csv"]),
    ],
)
def test_globs(data, pattern, expected):
    """*, ? and [] within a name, ** over folders, none of them at the dot of a hidden name."""
    assert found(data / pattern, below=data) == expected


def test_a_file_that_is_named_twice_is_scored_once(data):
    """By name, by glob and by folder it is the same file."""
    assert found(data / "b.csv", data / "*.csv", data, below=data) == found(data, below=data)


def test_a_name_with_brackets_is_a_name_where_it_is_there(data):
    """Only what is not there is taken for a glob."""
    (data / "[ab].csv").write_text("x")

    assert found(data / "[ab].csv", below=data) == ["[ab].csv"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [("nothing.csv", "not there"), ("*.txt", "not there"), ("notes.md", "cannot be scored"), ("empty", "nothing")],
)
def test_what_cannot_be_scored_is_refused(data, argument, message):
    """A run does not begin on less than it was asked for."""
    (data / "empty").mkdir()

    with pytest.raises(DataError, match=message):
        find_inputs([str(data / argument)], images=False)


def test_a_name_that_is_not_utf8_is_refused(data):
    """No column of the answers could hold it; the message shows which it is."""
    Path(os.fsdecode(os.fsencode(data) + b"/caf\xe9.csv")).write_text("x")

    with pytest.raises(DataError, match=r"caf\\xe9\.csv.* is not UTF-8"):
        find_inputs([str(data)], images=False)


def test_images_of_folders_and_globs_are_one_input(data):
    """They are sorted by path; another content or time is another version."""
    for name in ("deep/y.JPG", "x.png", "z.jpeg"):
        (data / name).write_bytes(b"1")
    for name in ("a.parquet", "b.csv", "e.npz", "deep/c.jsonl", "deep/deeper/d.csv"):
        (data / name).unlink()
    (one,) = find_inputs([str(data), str(data / "x.png")], images=True)
    (data / "x.png").write_bytes(b"12")
    (other,) = find_inputs([str(data)], images=True)

    assert one.file.path == str(data)
    assert [Path(entry).name for entry in one.entries] == ["y.JPG", "x.png", "z.jpeg"]
    assert one.file.version != other.file.version


def test_images_beside_tables_are_refused(data):
    """Which of them is the input is for the user to say."""
    (data / "x.png").write_bytes(b"1")

    with pytest.raises(DataError, match=r"images and tables.*/\*\.jpg"):
        find_inputs([str(data)], images=True)
    assert found(data, below=data) != []  # a bundle that takes no images passes them over


def test_every_line_of_a_list_is_an_image(data):
    """Relative to the folder of the list; a line that is there twice counts twice."""
    (data / "list.txt").write_text("deep/x.png\n\n/else/y.png\ndeep/x.png\ns3://bucket/z.png\n")
    (one,) = find_inputs([str(data / "list.txt")], images=True)

    assert one.entries == (f"{data}/deep/x.png", "/else/y.png", f"{data}/deep/x.png", "s3://bucket/z.png")


@pytest.fixture
def memory():
    """A file system that lives in this process, as fsspec has it."""
    system = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("bucket/a.csv", "bucket/deep/b.csv", "bucket/deep/c.md"):
        system.pipe_file(f"/{name}", b"text\nhello\n")
    yield system
    system.rm("/bucket", recursive=True)


def test_urls_are_listed_matched_and_read_as_local_files_are(memory):
    """Every file has a URL of its own, by which it can be opened."""
    assert found("memory://bucket") == ["memory://bucket/a.csv", "memory://bucket/deep/b.csv"]
    assert found("memory://bucket/**/*.csv") == ["memory://bucket/a.csv", "memory://bucket/deep/b.csv"]
    assert found("memory://bucket/*.csv") == ["memory://bucket/a.csv"]
    with open_file("memory://bucket/a.csv") as file:
        file.seek(5)
        assert file.read() == b"hello\n"
    before = version_of("memory://bucket/a.csv")
    memory.pipe_file("/bucket/a.csv", b"changed")
    assert version_of("memory://bucket/a.csv") != before
    assert version_of("memory://bucket/gone.csv") == (-1, "")


def test_a_protocol_that_nobody_knows_is_refused():
    """Also one whose package is not installed."""
    with pytest.raises((DataError, MissingExtra), match=r"nowhere://|not known|s3fs"):
        find_inputs(["nowhere://bucket/a.csv"], images=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x.png", "/data/x.png"), ("a/x.png", "/data/a/x.png"), ("/x.png", "/x.png"), ("gs://b/x", "gs://b/x")],
)
def test_a_path_in_a_file_is_beside_the_file(name, expected):
    """Relative names are looked for in the folder that the file is in."""
    assert beside("/data/list.csv", name) == expected
