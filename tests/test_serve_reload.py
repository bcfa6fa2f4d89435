import os
import queue
import shutil
import threading

import pytest
import watchfiles

from bundle.log import captured
from serve.config import ServeConfig
from serve.reload import Watcher
from serve.repository import Repository
from tests.serve_bundles import write_text_bundle

PATIENCE_S = 20.0  # until a test gives up; what it waits for comes in a fraction of a second


class Looks:
    """Counts the looks at the disk, and can be made to do something before and after it counts."""

    def __init__(self):
        self.made = queue.Queue()
        self.before = lambda: None
        self.then = lambda: None

    def __call__(self):
        self.before()
        self.made.put(threading.current_thread())
        self.then()

    def wait(self):
        return self.made.get(timeout=PATIENCE_S)


@pytest.fixture
def looks():
    return Looks()


@pytest.fixture
def watch(looks):
    """Start to watch; the first look, which comes at once, has been seen."""
    watchers = []

    def start(*paths):
        watchers.append(Watcher(paths, looks))
        looks.wait()
        return watchers[-1]

    yield start
    for watcher in watchers:
        assert watcher.stop(PATIENCE_S)


def add_version(repository, name="model", version=1):
    """A whole version, renamed into place."""
    beside = repository / ".beside"
    beside.mkdir(parents=True)
    (beside / "model.onnx").write_bytes(b"graph")
    (repository / name).mkdir(exist_ok=True)
    return beside.rename(repository / name / str(version))


def test_version_renamed_into_place_is_seen(tmp_path, watch, looks):
    """A new version of a model that is there, and a new model, each lead to a look."""
    add_version(tmp_path)
    watch(tmp_path)

    add_version(tmp_path, version=2)
    looks.wait()
    add_version(tmp_path, "other")
    looks.wait()


def test_what_grows_in_a_new_folder_is_seen(tmp_path, watch, looks):
    """A version that is written file by file is looked at again when a file is added to it."""
    watch(tmp_path)
    (tmp_path / "model" / "1").mkdir(parents=True)
    looks.wait()

    (tmp_path / "model" / "1" / "model.onnx").write_bytes(b"graph")
    looks.wait()


def test_removed_version_is_seen(tmp_path, watch, looks):
    """A version that goes leads to a look."""
    version = add_version(tmp_path)
    watch(tmp_path)

    (version / "model.onnx").unlink()
    looks.wait()


def test_a_name_that_is_not_utf8_keeps_no_change_from_being_seen(tmp_path, watch, looks):
    """A folder that cannot be watched is passed over."""
    add_version(tmp_path, os.fsdecode(b"bad\xff"))
    watch(tmp_path)

    add_version(tmp_path)
    looks.wait()


def test_file_renamed_into_place_is_seen(tmp_path, watch, looks):
    """A watched file may be replaced by another of its name, again and again."""
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"one")
    watch(graph)

    for content in (b"two", b"three"):
        (tmp_path / "beside").write_bytes(content)
        (tmp_path / "beside").rename(graph)
        looks.wait()


def test_path_that_vanished_and_came_back_is_seen(tmp_path, watch, looks):
    """A path, and the folder that it lies in, may go and come back; then it is watched as before."""
    root = tmp_path / "volume" / "models"
    add_version(root)
    watch(root)

    (tmp_path / "volume").rename(tmp_path / "gone")
    looks.wait()
    add_version(root)
    looks.wait()
    add_version(root, version=2)
    looks.wait()


def test_link_to_another_folder_is_seen(tmp_path, watch, looks):
    """A path may be a link that is pointed elsewhere, and then what is there is watched."""
    for release in ("a", "b"):
        add_version(tmp_path / release)
    current = tmp_path / "current"
    current.symlink_to("a")
    watch(current)

    (tmp_path / "beside").symlink_to("b")
    (tmp_path / "beside").rename(current)
    looks.wait()
    add_version(tmp_path / "b", version=2)
    looks.wait()


def test_link_on_the_way_to_a_file_is_seen(tmp_path, watch, looks):
    """A file that is a link through an exchanged folder, as in a mounted Kubernetes volume, is seen to change."""
    for release in ("..1", "..2"):
        (tmp_path / release).mkdir()
        (tmp_path / release / "model.onnx").write_bytes(release.encode())
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "model.onnx").symlink_to("..data/model.onnx")
    watch(tmp_path / "model.onnx")

    (tmp_path / "..beside").symlink_to("..2")
    (tmp_path / "..beside").rename(tmp_path / "..data")
    looks.wait()


def test_change_during_a_look_is_not_missed(tmp_path, watch, looks):
    """What changes while the repository is being looked at is looked at afterwards."""
    watch(tmp_path)
    changed = []

    def change_once():
        if not changed:
            changed.append(add_version(tmp_path, "late"))

    looks.then = change_once
    add_version(tmp_path)
    looks.wait()
    looks.wait()

    assert changed


def test_error_does_not_end_the_watch(tmp_path, watch, looks):
    """A look that fails is logged, and the next change leads to the next look."""
    watch(tmp_path)

    def fail():
        raise OSError("no")

    looks.then = fail
    with captured() as lines:
        add_version(tmp_path)
        looks.wait()
        add_version(tmp_path, "other")
        looks.wait()

    assert lines[0]["event"].startswith("looking at the disk failed")


def test_unreadable_folder_does_not_end_the_watch(tmp_path, watch, looks, monkeypatch):
    """A folder that may not be listed is left out, and the others are watched."""
    (tmp_path / "locked").mkdir()
    listing = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listing(folder if "locked" not in str(folder) else "/nowhere"))
    watch(tmp_path)

    add_version(tmp_path)
    looks.wait()


def test_what_happens_beside_a_path_is_no_reason_to_look(tmp_path, watch, looks, monkeypatch):
    """The folder that a path lies in may be a busy one; only what is at the path or below it counts."""
    told = [set(), *({(1, str(tmp_path / name))} for name in ("log.txt", "models.old", "models"))]

    def tell(*folders, **options):
        """Three changes once, then what there is."""
        while told:
            yield told.pop(0)
        yield from watchfiles.watch(*folders, **options)

    monkeypatch.setattr("serve.reload.watch", tell)
    (tmp_path / "models").mkdir()
    watcher = watch(tmp_path / "models")
    looks.wait()

    assert watcher.stop(PATIENCE_S)
    assert looks.made.empty()


def test_disk_that_tells_nothing_is_looked_at_every_second(tmp_path, watch, looks, monkeypatch):
    """Where polling is asked for, as on a network file system, looks come without a change."""
    monkeypatch.setenv("WATCHFILES_FORCE_POLLING", "1")
    monkeypatch.setattr("serve.reload.POLL_MS", 50)
    watch(tmp_path)

    looks.wait()
    looks.wait()


def test_looks_come_one_after_another(tmp_path, watch, looks):
    """All looks come from one thread, which ends when it is told to."""
    watcher = watch(tmp_path)
    add_version(tmp_path)
    thread = looks.wait()

    assert thread is not threading.current_thread()
    assert watcher.stop(PATIENCE_S)
    assert not thread.is_alive()


@pytest.fixture
def repository(tmp_path, watch, looks):
    """One that serves version 1 of a bundle and is watched."""
    write_text_bundle(tmp_path / "mood" / "1")
    repository = Repository(ServeConfig((tmp_path,), device="cpu", threads=1))
    looks.before = repository.refresh
    watch(tmp_path)
    yield repository
    assert repository.close(PATIENCE_S)


def index(repository):
    return {entry.version: (entry.state, entry.reason) for entry in repository.index() if entry.name == "mood"}


def test_new_version_is_served(tmp_path, repository, looks):
    """What is renamed into place is found, loaded and served without a word from anybody."""
    write_text_bundle(tmp_path / "mood" / "2", version=2)
    while repository.versions("mood") != [2]:
        looks.wait()


def test_incomplete_version_waits(tmp_path, repository, looks):
    """A bundle that is copied file by file is served when its last file is there, and not a word is said before."""
    whole = write_text_bundle(tmp_path.parent / f"{tmp_path.name}-whole", version=2)
    folder = tmp_path / "mood" / "2"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("manifest.sha256"))
    looks.wait()
    assert index(repository) == {"1": ("READY", "")}

    shutil.copy(whole / "manifest.sha256", folder)
    while repository.versions("mood") != [2]:
        looks.wait()


def test_bad_version_is_refused_and_may_be_mended(tmp_path, repository, looks):
    """A damaged version leaves the old one serving and says why; when its files are put right it is served."""
    beside = write_text_bundle(tmp_path / ".mended", version=2)
    bad = shutil.copytree(beside, tmp_path / ".bad")
    (bad / "model.onnx").write_bytes(b"no graph")
    bad.rename(tmp_path / "mood" / "2")
    while index(repository).get("2", ("", ""))[0] != "UNAVAILABLE":
        looks.wait()
    assert repository.versions("mood") == [1]

    shutil.copy(beside / "model.onnx", tmp_path / "mood" / "2")
    while repository.versions("mood") != [2]:
        looks.wait()


def test_stop_does_not_wait_for_ever(tmp_path, watch, looks):
    """A look that is under way is not cut off, and whoever stops the watch is told that it goes on."""
    watcher = watch(tmp_path)
    go_on = threading.Event()
    looks.then = lambda: go_on.wait(PATIENCE_S)
    add_version(tmp_path)
    looks.wait()

    assert not watcher.stop(0)
    go_on.set()
    assert watcher.stop(PATIENCE_S)
