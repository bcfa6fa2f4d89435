"""What lies below a path: which versions there are, which of them a policy serves, what is wrong with the others."""

import os
import shutil

import numpy as np
import pytest

from bundle.store import DIGEST
from serve.errors import StartError
from serve.layout import choose_versions, find_places, parse_versions
from tests.serve_bundles import identity, write_image_bundle, write_text_bundle

GRAPH = identity(np.float32, [None, 2])


def write_graph(folder, name="model.onnx"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(GRAPH)
    return folder / name


def look(*paths, versions="latest"):
    return find_places(paths, parse_versions(versions))


def found(*paths, versions="latest"):
    layout = look(*paths, versions=versions)
    assert not layout.failures
    return [(place.name, place.version, place.path) for place in layout.places]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("latest", [12]),
        ("latest:1", [12]),
        ("latest:2", [9, 12]),
        ("latest:99", [1, 9, 12]),
        ("all", [1, 9, 12]),
        ("1", [1]),
        ("12,1", [1, 12]),
        ("2,9", [9]),
        ("2", []),
    ],
)
def test_a_policy_chooses_versions_by_number(text, chosen):
    """The latest is the highest as a number, and a version that is not there is not chosen."""
    assert choose_versions(parse_versions(text), [9, 12, 1]) == chosen


@pytest.mark.parametrize(
    "text", ["", "newest", "latest:", "latest:0", "latest:-1", "1,", "0", "1,01", "1 3", "-1", "all:2", "9" * 19]
)
def test_what_is_no_policy_is_refused(text):
    """A typing mistake does not serve another version."""
    with pytest.raises(StartError, match="expected latest, latest:N, all, or numbers"):
        parse_versions(text)


def test_every_kind_of_path_is_known(tmp_path):
    """A bundle, a folder of bundles, a graph, and repositories of both give places under their own names."""
    bundle = write_text_bundle(tmp_path / "x", version=3)
    colours = write_image_bundle(tmp_path / "folder" / "y")
    plain = write_graph(tmp_path, "echo.v2.onnx")
    triton = write_graph(tmp_path / "repository" / "plain" / "7")
    tone = write_text_bundle(tmp_path / "repository" / "tone" / "2", name="tone", version=2)

    assert found(bundle, tmp_path / "folder", plain, tmp_path / "repository") == [
        ("mood", 3, bundle),
        ("colour", 1, colours),
        ("echo.v2", 1, plain),
        ("plain", 7, triton),
        ("tone", 2, tone),
    ]


def test_the_highest_version_is_served_unless_others_are_asked_for(tmp_path):
    """The policy holds for each model of a repository, bundles and graphs."""
    for version in (9, 10):
        write_graph(tmp_path / "m" / str(version))
        write_text_bundle(tmp_path / "mood" / str(version), version=version)

    assert [each[:2] for each in found(tmp_path)] == [("m", 10), ("mood", 10)]
    assert [each[:2] for each in found(tmp_path, versions="9")] == [("m", 9), ("mood", 9)]
    assert len(found(tmp_path, versions="all")) == 4


def test_what_was_given_itself_is_served_whatever_the_policy(tmp_path):
    """Two versions of a bundle that the server was given by their paths are both meant."""
    old, new = (write_text_bundle(tmp_path / f"b{version}", version=version) for version in (1, 2))

    assert [each[1] for each in found(old, new)] == [1, 2]
    assert [each[1] for each in found(tmp_path)] == [2]


def test_a_model_s_own_policy_wins(tmp_path):
    """version_policy of a config.pbtxt counts for its model alone."""
    for name in ("a", "b"):
        for version in (1, 2, 3):
            write_graph(tmp_path / name / str(version))
    (tmp_path / "a" / "config.pbtxt").write_text("version_policy { specific { versions: [ 1, 2 ] } }")
    (tmp_path / "b" / "config.pbtxt").write_text("max_batch_size: 4")

    assert [each[:2] for each in found(tmp_path)] == [("a", 1), ("a", 2), ("b", 3)]


def test_a_configuration_names_the_file(tmp_path):
    """With default_model_filename only that file makes a version complete."""
    write_graph(tmp_path / "m" / "1", "net.onnx")
    write_graph(tmp_path / "m" / "2", "model.onnx")
    (tmp_path / "m" / "config.pbtxt").write_text('default_model_filename: "net.onnx"')

    layout = look(tmp_path)

    assert [place.version for place in layout.places] == [1]
    assert [line for line in layout.skipped if "m/2 is not complete" in line and "net.onnx" in line]


def test_an_incomplete_version_is_not_there_yet(tmp_path):
    """What is still being copied is skipped and said, and the version before it is the latest."""
    write_graph(tmp_path / "m" / "1")
    (tmp_path / "m" / "2").mkdir()
    write_text_bundle(tmp_path / "mood" / "1")
    half = write_text_bundle(tmp_path / "mood" / "2", version=2)
    (half / DIGEST).unlink()
    (tmp_path / "m" / ".3.part").mkdir()

    layout = look(tmp_path)

    assert [(place.name, place.version) for place in layout.places] == [("m", 1), ("mood", 1)]
    assert [line.split(" is not complete")[0] for line in layout.skipped] == [str(tmp_path / "m" / "2"), str(half)]


@pytest.mark.parametrize("version", ["0", "01", "-1", "v1", "1.5", "configs"])
def test_a_folder_that_is_no_version_is_skipped_and_said(tmp_path, version):
    """It is not served as another version by accident, and keeps none from being served."""
    write_graph(tmp_path / "m" / version)
    write_graph(tmp_path / "m" / "4")

    layout = look(tmp_path)

    assert [place.version for place in layout.places] == [4]
    assert [line for line in layout.skipped if f"m/{version} is not a version" in line]


@pytest.mark.parametrize("folder", ["\xff", "m/\xff", "\xff/1"])
def test_a_name_that_no_message_can_hold_is_skipped_and_said(tmp_path, folder):
    """The bytes of a folder's name need not be UTF-8; it keeps no other from being served."""
    write_graph(tmp_path / "good" / "1")
    write_graph(tmp_path / "m" / "1")
    bad = tmp_path / os.fsdecode(folder.encode("latin-1"))
    write_graph(bad)

    layout = look(tmp_path)

    assert [(place.name, place.version) for place in layout.places] == [("good", 1), ("m", 1)]
    assert not layout.failures
    assert len(layout.skipped) == 1
    assert "has a name that is not UTF-8" in layout.skipped[0]


def test_a_graph_whose_name_no_message_can_hold_is_refused(tmp_path):
    """Who names such a file is told."""
    graph = write_graph(tmp_path, os.fsdecode(b"bad\xff.onnx"))

    [failure] = look(graph).failures

    assert "has a name that is not UTF-8" in str(failure.error)


def test_a_stamp_changes_with_any_file_that_counts(tmp_path):
    """The graph, the configuration and the labels count; hidden files and other versions do not."""
    graph = write_graph(tmp_path / "m" / "1")
    config, labels = tmp_path / "m" / "config.pbtxt", tmp_path / "m" / "labels.txt"
    stamps = []

    def stamp():
        stamps.append(look(tmp_path, versions="1").places[0].stamp)
        return len(set(stamps))

    assert stamp() == 1
    write_graph(tmp_path / "m" / "2")
    (tmp_path / "m" / ".swap").write_text("x")
    assert stamp() == 1
    config.write_text("max_batch_size: 0")
    assert stamp() == 2
    labels.write_text("a")
    assert stamp() == 3
    shutil.copy(graph, graph.with_suffix(".new"))
    graph.with_suffix(".new").rename(graph)
    assert stamp() == 4


def test_one_model_s_fault_is_its_own(tmp_path):
    """A configuration, a manifest or a folder that cannot be used is told with its path, and the others are found."""
    write_graph(tmp_path / "good" / "1")
    write_graph(tmp_path / "bad" / "1")
    (tmp_path / "bad" / "config.pbtxt").write_text("ensemble_scheduling {}")
    (tmp_path / "empty").mkdir()
    damaged = write_text_bundle(tmp_path / "torn")
    (damaged / "manifest.json").write_text("{}")
    write_graph(tmp_path / "old" / "1")
    (tmp_path / "old" / "config.pbtxt").write_text("version_policy { specific { versions: 8 } }")

    layout = look(tmp_path, tmp_path / "missing")

    assert [place.name for place in layout.places] == ["good"]
    assert {failure.name: failure.path for failure in layout.failures} == {
        "bad": tmp_path / "bad",
        "empty": tmp_path / "empty",
        "torn": damaged,
        "": tmp_path / "missing",
        "old": tmp_path / "old" / "1" / "model.onnx",
    }


def test_a_configuration_does_not_describe_a_bundle(tmp_path):
    """Two descriptions of one model are one too many."""
    write_text_bundle(tmp_path / "mood" / "1")
    (tmp_path / "mood" / "config.pbtxt").write_text("max_batch_size: 4")

    [failure] = look(tmp_path).failures

    assert "version 1 is a bundle" in str(failure.error)


def test_two_places_of_one_name_and_version_are_told_apart(tmp_path):
    """The second is a failure that names both, also where it is the bare graph of a bundle that has the name."""
    first = write_text_bundle(tmp_path / "a")
    second = write_text_bundle(tmp_path / "b")
    graph = write_graph(tmp_path, "mood.onnx.onnx")

    layout = look(first, second, graph)

    assert [place.path for place in layout.places] == [first]
    assert [failure.path for failure in layout.failures] == [second, graph]
    assert str(first) in str(layout.failures[0].error)
