"""What happens to a server's models while it runs: swapped, refused, unloaded, and never out of reach in between."""

import gc
import json
import os
import shutil
import threading
import weakref

import numpy as np
import pytest

from bundle.errors import BadInput
from bundle.log import captured
from bundle.session import Session
from bundle.store import DIGEST, MANIFEST, digest_line
from serve.config import ServeConfig
from serve.errors import Closed, LoadFailed, NotReady, UnknownModel
from serve.queue import Job
from serve.repository import Repository
from tests.serve_bundles import counter, identity, write_text_bundle

X = np.array([[1, 2]], np.float32)


def start(*paths, **options):
    return Repository(ServeConfig(paths, device="cpu", threads=1, **options))


def write_graph(folder, graph=None):
    """A version folder of a plain graph that is whole or not there."""
    beside = folder.parent / f".{folder.name}"
    beside.mkdir(parents=True)
    (beside / "model.onnx").write_bytes(graph or identity(np.float32, [None, 2]))
    return beside.rename(folder)


def states(repository, name=None):
    return {
        (entry.name, entry.version): entry.state for entry in repository.index() if name is None or entry.name == name
    }


def reasons(repository):
    return {(entry.name, entry.version): entry.reason for entry in repository.index() if entry.reason}


def drain(repository):
    """Wait until nothing drains any more."""
    for thread in threading.enumerate():
        if thread.name.startswith("drain-"):
            thread.join(10)


class Call:
    """One request, and what became of it."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.outcome = None
        self.ended = threading.Event()

    def __call__(self, served):
        served.scheduler.submit(Job(arrays=self.arrays, rows=1, key=None, done=self._done))
        return served.model.version

    def _done(self, outcome):
        self.outcome = outcome
        self.ended.set()

    def answer(self):
        assert self.ended.wait(30)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def test_a_new_version_takes_the_place_of_the_old(tmp_path):
    """After it was written the next look swaps it in, and the old one drains and is gone."""
    write_text_bundle(tmp_path / "mood" / "1")
    repository = start(tmp_path)
    old = repository.find("mood", "")
    write_text_bundle(tmp_path / "mood" / "2", version=2)
    repository.refresh()

    assert repository.versions("mood") == repository.versions("mood.onnx") == [2]
    drain(repository)
    assert states(repository) == {("mood", "2"): "READY", ("mood.onnx", "2"): "READY"}
    with pytest.raises(Closed):
        Call({})(old)
    with pytest.raises(UnknownModel, match="version 1 is not found; it has versions 2"):
        repository.find("mood", "1")


def test_a_look_at_an_unchanged_disk_changes_nothing(tmp_path):
    """The very same models are served afterwards."""
    write_text_bundle(tmp_path / "mood" / "1")
    write_graph(tmp_path / "m" / "1")
    repository = start(tmp_path)
    before = list(repository)

    repository.refresh()

    assert list(repository) == before


def test_what_is_being_written_is_not_seen_before_it_is_whole(tmp_path):
    """The manifest's digest is the last file of a bundle; without it the old version is served on, and no error."""
    write_text_bundle(tmp_path / "r" / "mood" / "1")
    repository = start(tmp_path / "r")
    whole, part = write_text_bundle(tmp_path / "b", version=2), tmp_path / "r" / "mood" / "2"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns(DIGEST))

    repository.refresh()
    assert states(repository, "mood") == {("mood", "1"): "READY"}
    shutil.copy(whole / DIGEST, part)
    repository.refresh()

    assert repository.versions("mood") == [2]


def damage_a_file(folder):
    write_text_bundle(folder, version=2)
    (folder / "golden0").write_bytes(b"the film is evil")


def fail_the_gate(folder):
    write_text_bundle(folder, version=2, precision="int8", verdict="FAIL")


def break_the_graph(folder):
    write_graph(folder, b"no graph")


def hold_another_version(folder):
    write_text_bundle(folder, version=3)


def shift_a_golden_logit(folder):
    write_text_bundle(folder, version=2)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["goldens"][0]["logits"]["only"]["logits"][0] += 1
    data = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / DIGEST).write_bytes(digest_line(MANIFEST, data))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (damage_a_file, "a file of the bundle is missing, unlisted or changed"),
        (fail_the_gate, "no accuracy gate has passed it, and this server asks for one"),
        (break_the_graph, "the graph cannot be loaded"),
        (shift_a_golden_logit, "this device does not reproduce the golden examples"),
        (hold_another_version, "the server's log says why"),
    ],
)
def test_a_bad_version_is_refused_and_the_old_one_serves_on(tmp_path, write, reason):
    """The reason is told without a path and logged with it, once; a good version after it is served."""
    write_text_bundle(tmp_path / "mood" / "1")
    repository = start(tmp_path, require_gate=True)
    served = repository.find("mood", "")
    write(tmp_path / "mood" / "2")

    with captured() as logs:
        repository.refresh()
        repository.refresh()

    assert repository.find("mood", "") is served
    assert Call({"text": np.array([[b"good"]], object)})(served) == 1
    [refusal] = [entry for entry in logs if entry["event"] == "not loaded"]
    assert refusal["path"].startswith(str(tmp_path / "mood" / "2"))
    assert states(repository, "mood")["mood", "2"] == "UNAVAILABLE"
    assert reasons(repository)["mood", "2"] == reason
    write_text_bundle(tmp_path / "mood" / "4", version=4)
    repository.refresh()
    assert repository.versions("mood") == [4]
    assert not reasons(repository)


def test_a_second_bundle_of_a_name_and_version_takes_no_place(tmp_path):
    """Also where it comes first in the alphabet: what is served is served on, and the other one is told of."""
    write_text_bundle(tmp_path / "mood")
    repository = start(tmp_path)
    served = repository.find("mood", "")
    write_text_bundle(tmp_path / "copy of mood")

    with captured() as logs:
        repository.refresh()

    assert repository.find("mood", "") is served
    (told,) = [each["because"] for each in logs if each["event"] == "not served"]
    assert "mood and " in told
    assert "copy of mood are both model 'mood' version 1" in told


def test_a_refused_version_is_tried_again_when_its_files_change(tmp_path):
    """And when a client asks for it."""
    write_graph(tmp_path / "m" / "1")
    repository = start(tmp_path)
    write_graph(tmp_path / "m" / "2", b"half a graph")
    repository.refresh()
    with pytest.raises(LoadFailed, match=r"^failed to load 'm', version 2: the graph cannot be loaded$"):
        repository.load("m")
    shutil.copy(tmp_path / "m" / "1" / "model.onnx", tmp_path / "m" / "2" / "model.onnx")

    repository.refresh()

    assert repository.versions("m") == [2]


def test_a_version_whose_files_were_replaced_is_loaded_again(tmp_path):
    """Also in place; and where the new files are bad, the old version serves on and says so."""
    write_text_bundle(tmp_path / "mood" / "1")
    repository = start(tmp_path)
    first = repository.find("mood", "")
    write_text_bundle(tmp_path / ".new")
    shutil.rmtree(tmp_path / "mood" / "1")
    (tmp_path / ".new").rename(tmp_path / "mood" / "1")
    repository.refresh()
    second = repository.find("mood", "")
    (tmp_path / "mood" / "1" / "golden0").write_bytes(b"bad")
    repository.refresh()

    assert first is not second
    assert repository.find("mood", "") is second
    assert states(repository, "mood") == {("mood", "1"): "READY"}
    assert "missing, unlisted or changed" in reasons(repository)["mood", "1"]


def test_taking_the_latest_version_away_goes_back_to_the_one_before(tmp_path):
    """The policy is asked anew at every look."""
    write_graph(tmp_path / "m" / "1")
    write_graph(tmp_path / "m" / "2")
    repository = start(tmp_path)
    shutil.rmtree(tmp_path / "m" / "2")

    repository.refresh()

    assert repository.versions("m") == [1]


def test_a_model_that_is_gone_from_the_repository_is_unloaded(tmp_path):
    """Then its name is unknown."""
    write_graph(tmp_path / "m" / "1")
    write_graph(tmp_path / "n" / "1")
    repository = start(tmp_path)
    shutil.rmtree(tmp_path / "m")

    repository.refresh()
    drain(repository)

    assert states(repository) == {("n", "1"): "READY"}
    with pytest.raises(UnknownModel):
        repository.find("m", "")


@pytest.mark.parametrize("what", ["repository", "bundle", "config.pbtxt", "version"])
def test_what_cannot_be_looked_at_is_served_on(tmp_path, what):
    """A path that vanished, a configuration that cannot be read, a model without a whole version: nothing is lost."""
    write_graph(tmp_path / "r" / "m" / "1")
    bundle = write_text_bundle(tmp_path / "b")
    repository = start(tmp_path / "r", bundle)
    before = list(repository)
    match what:
        case "repository":
            (tmp_path / "r").rename(tmp_path / "away")
        case "bundle":
            bundle.rename(tmp_path / "away")
        case "config.pbtxt":
            (tmp_path / "r" / "m" / "config.pbtxt").write_text("platform: 'ensemble'")
        case "version":
            (tmp_path / "r" / "m" / "1" / "model.onnx").unlink()

    with captured() as logs:
        repository.refresh()
        repository.refresh()

    assert list(repository) == before
    with pytest.raises(LoadFailed, match=r"^failed to load '(m|mood)': ") as error:
        repository.load("mood" if what == "bundle" else "m")
    assert str(tmp_path) not in str(error.value)
    assert list(repository) == before
    assert len([entry for entry in logs if entry["level"] == "warning"]) in (1, 2)  # each line once
    assert not [text for text in reasons(repository).values() if str(tmp_path) in text]


def test_a_configuration_that_changes_is_applied(tmp_path):
    """config.pbtxt is one of the model's files."""
    write_graph(tmp_path / "m" / "1")
    repository = start(tmp_path)
    assert repository.find("m", "").model.max_batch == 0
    (tmp_path / "m" / "config.pbtxt").write_text("max_batch_size: 4")

    repository.refresh()

    assert repository.find("m", "").model.max_batch == 4


def test_several_versions_come_and_go_as_the_policy_says(tmp_path):
    """latest:2 keeps two, and all keeps every one."""
    for version in (1, 2):
        write_graph(tmp_path / "m" / str(version))
    some, every = start(tmp_path, versions="latest:2"), start(tmp_path, versions="all")
    kept = some.find("m", "2")
    write_graph(tmp_path / "m" / "3")

    some.refresh()
    every.refresh()

    assert (some.versions("m"), every.versions("m")) == ([2, 3], [1, 2, 3])
    assert some.find("m", "2") is kept


def test_a_call_that_meets_a_swap_is_answered_by_the_successor(tmp_path):
    """Between the look-up and the queue the version may close; then the call looks again."""
    write_graph(tmp_path / "m" / "1")
    repository = start(tmp_path)
    call, met = Call({"x": X}), []

    def use(served):
        met.append(served.model.version)
        if len(met) == 1:
            write_graph(tmp_path / "m" / "2")
            repository.refresh()
            drain(repository)
        return call(served)

    assert repository.call("m", "", use) == 2
    assert met == [1, 2]
    assert np.array_equal(call.answer()["y"], X)


def test_no_call_fails_while_versions_are_swapped(tmp_path):
    """Threads that call without a pause are answered by one version or the other, through every swap."""
    write_graph(tmp_path / "m" / "1")
    repository = start(tmp_path)
    stop, answered, failed = threading.Event(), set(), []

    def work():
        try:
            while not stop.is_set():
                call = Call({"x": X})
                answered.add(repository.call("m", "", call))
                call.answer()
        except Exception as error:
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for version in range(2, 8):
        write_graph(tmp_path / "m" / str(version))
        repository.refresh()
        repository.call("m", "", call := Call({"x": X}))
        call.answer()
    stop.set()
    for worker in workers:
        worker.join()

    assert not failed
    assert answered <= set(range(1, 8))
    assert answered


def test_calls_that_run_end_before_their_model_is_gone(tmp_path):
    """Unloading returns after the last answer, and in the meantime the index says so."""
    write_graph(tmp_path / "slow" / "1", counter())
    repository = start(tmp_path)
    call = Call({"n": np.array(300_000)})
    repository.call("slow", "", call)
    seen = []
    repository.on_change = lambda name, ready: seen.append((name, ready, call.ended.is_set(), states(repository)))

    repository.unload("slow")

    assert call.ended.is_set()
    assert call.answer()["count"] == 300_000
    assert [each[:3] for each in seen] == [("slow", False, False)]
    assert states(repository) == {("slow", "1"): "UNAVAILABLE"}
    assert reasons(repository) == {("slow", "1"): "unloaded"}


def test_an_unloaded_model_stays_unloaded_until_it_is_loaded(tmp_path):
    """A look at the disk does not bring it back, a client does; both names of a bundle are the same."""
    write_text_bundle(tmp_path / "mood" / "1")
    repository = start(tmp_path)
    changes = []
    repository.on_change = lambda *change: changes.append(change)

    repository.unload("mood.onnx")
    repository.unload("mood")
    repository.refresh()
    with pytest.raises(NotReady, match="'mood' is not at ready state"):
        repository.find("mood", "")
    with pytest.raises(NotReady, match=r"'mood\.onnx' version 1 is not at ready state"):
        repository.find("mood.onnx", "1")
    with pytest.raises(UnknownModel):
        repository.find("mood", "2")
    write_text_bundle(tmp_path / "mood" / "2", version=2)
    repository.load("mood.onnx")

    assert states(repository) == {("mood", "2"): "READY", ("mood.onnx", "2"): "READY"}
    assert changes == [("mood", False), ("mood.onnx", False), ("mood", True), ("mood.onnx", True)]


@pytest.mark.parametrize("name", ["", "x", "../m", "m/1", "/etc/passwd", "m\0", ".m", "a" * 5000])
def test_only_what_lies_below_the_paths_is_loaded_or_unloaded(tmp_path, name):
    """A name is looked up among those that were found; no path is made of it."""
    write_graph(tmp_path / "r" / "m" / "1")
    write_graph(tmp_path / "x" / "1")
    repository = start(tmp_path / "r")

    with pytest.raises((UnknownModel, BadInput)):
        repository.load(name)
    with pytest.raises((UnknownModel, BadInput)):
        repository.unload(name)

    assert repository.names() == ["m"]


def test_loading_what_fails_leaves_what_is_served(tmp_path):
    """And the text for the client names the field of the configuration, but no path."""
    write_graph(tmp_path / "m" / "1")
    repository = start(tmp_path)
    (tmp_path / "m" / "config.pbtxt").write_text("max_batch_size: 4 response_cache { enable: true }")

    with pytest.raises(LoadFailed, match=r"^failed to load 'm': config\.pbtxt .*response_cache is not supp") as error:
        repository.load("m")

    assert str(tmp_path) not in str(error.value)
    assert repository.versions("m") == [1]


@pytest.fixture
def sessions(monkeypatch):
    """Every session that is alive; the garbage collector, which does not go through what was there first, is off."""
    alive, begin = weakref.WeakSet(), Session.__init__

    def remember(session, *args, **options):
        alive.add(session)
        begin(session, *args, **options)

    monkeypatch.setattr(Session, "__init__", remember)
    gc.disable()
    yield alive
    gc.enable()


def test_a_session_is_freed_when_its_version_is_gone(tmp_path, sessions):
    """Of a bundle and of a graph, after calls were made."""
    write_text_bundle(tmp_path / "mood" / "1")
    write_graph(tmp_path / "m" / "1")
    sessions.clear()  # of the bundle's writer
    repository = start(tmp_path)
    repository.call("m", "", call := Call({"x": X}))
    call.answer()
    old = list(map(weakref.ref, sessions))
    write_text_bundle(tmp_path / "mood" / "2", version=2)
    write_graph(tmp_path / "m" / "2")

    repository.refresh()
    drain(repository)

    assert len(old) == 2
    assert [each() for each in old] == [None, None]


def test_what_was_refused_is_freed(tmp_path, sessions):
    """Its error is kept for the index, but not the session in whose loading it was raised."""
    write_text_bundle(tmp_path / "mood" / "1")
    repository = start(tmp_path, require_gate=True)
    fail_the_gate(tmp_path / "mood" / "2")
    write_graph(tmp_path / "m" / "1")
    sessions.clear()

    repository.refresh()

    assert len(reasons(repository)) == 3
    assert not sessions


def test_changes_from_several_threads_are_made_one_after_the_other(tmp_path):
    """Whoever was last, what is served is whole, and no call of the others failed with anything unexpected."""
    for name in "ab":
        write_graph(tmp_path / name / "1")
    repository = start(tmp_path)
    failed = []

    def work(name):
        try:
            for change in (repository.unload, repository.load, lambda _: repository.refresh()):
                change(name)
        except Exception as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(name,)) for name in "abab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    repository.load("a")
    repository.load("b")
    drain(repository)

    assert not failed
    assert states(repository) == {("a", "1"): "READY", ("b", "1"): "READY"}


def test_a_closed_repository_takes_no_calls(tmp_path):
    """Those that came are answered; whether all were is told; nothing is loaded any more."""
    write_graph(tmp_path / "m" / "1")
    repository = start(tmp_path)
    repository.call("m", "", call := Call({"x": X}))

    assert repository.close(30)

    call.answer()
    with pytest.raises(Closed):
        repository.call("m", "", Call({"x": X}))
    write_graph(tmp_path / "m" / "2")
    repository.refresh()
    assert repository.versions("m") == [1]


def test_a_call_that_outlives_the_drain_is_told(tmp_path):
    """Closing returns in time, and says that not all calls have ended."""
    write_graph(tmp_path / "slow" / "1", counter())
    repository = start(tmp_path)
    call = Call({"n": np.array(400_000)})
    repository.call("slow", "", call)

    assert not repository.close(0.01)

    call.answer()


def test_a_link_to_a_version_is_followed(tmp_path):
    """A repository may be made of links, and one that is pointed elsewhere is another version of the files."""
    write_graph(tmp_path / "store" / "a")
    write_graph(tmp_path / "store" / "b", identity(np.float32, [None, 3]))
    (tmp_path / "r" / "m").mkdir(parents=True)
    link = tmp_path / "r" / "m" / "1"
    link.symlink_to(tmp_path / "store" / "a")
    repository = start(tmp_path / "r")
    (tmp_path / "next").symlink_to(tmp_path / "store" / "b")
    os.replace(tmp_path / "next", link)

    repository.refresh()

    assert repository.find("m", "").model.inputs[0].shape == (-1, 3)
