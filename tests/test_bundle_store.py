import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bundle import manifest as types
from bundle.errors import BundleDamaged, BundleError, BundleUnsupported, EdgewardError, OutputExists
from bundle.model import load_model
from bundle.store import DIGEST, MANIFEST, check_new, list_files, new_directory, open_bundle, seal

ROOT = Path(__file__).parents[1]
GOLDEN = sorted((Path(__file__).parent / "golden").glob("format-*"))


@pytest.fixture(params=GOLDEN, ids=[path.name for path in GOLDEN])
def path(request, tmp_path):
    return Path(shutil.copytree(request.param, tmp_path / "bundle"))


@pytest.fixture
def text(tmp_path):
    return Path(shutil.copytree(ROOT / "tests/golden/format-1-text", tmp_path / "text"))


def write_manifest(path, data):
    """Write the manifest with its right digest, whatever is in it: what a hostile builder could seal."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    (path / MANIFEST).write_bytes(data)
    (path / DIGEST).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n")


def read_manifest(path):
    return json.loads((path / MANIFEST).read_bytes())


def entry(data):
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


# Writing: whole or not at all.


def test_directory_appears_when_it_is_whole(tmp_path):
    """Nothing stands at the name before the block has ended, and everything after."""
    out = tmp_path / "a" / "b"
    with new_directory(out) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("x")
        assert not out.exists()

    assert (out / "sub" / "file").read_text() == "x"
    assert [each.name for each in out.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path, error):
    """An exception or an interrupt removes what was written so far."""

    def write():
        with new_directory(tmp_path / "out") as directory:
            (directory / "file").write_text("x")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file", "link", "dangling link"])
def test_what_exists_is_left_as_it_is(tmp_path, kind):
    """A name that is taken is refused before anything is written."""
    out = tmp_path / "out"
    if kind.endswith("directory"):
        out.mkdir()
    if kind == "directory":
        (out / "mine").write_text("kept")
    if kind == "file":
        out.write_text("kept")
    if kind.endswith("link"):
        out.symlink_to(tmp_path if kind == "link" else tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(OutputExists, match="out exists already"), new_directory(out):
        pytest.fail("the block ran")
    with pytest.raises(OutputExists, match="out exists already"):
        check_new(out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["file/b", "file/a/b", "n" * 255])
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, out):
    """Below a file no folder can be made, nor one with too long a name; the probe leaves nothing behind."""
    (tmp_path / "file").write_text("kept")

    check_new(tmp_path / "a" / "b")
    with pytest.raises(EdgewardError, match=r"cannot be written: no folder can be made in .* Choose another --out"):
        check_new(tmp_path / out)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_read_only_disk_is_said_before_the_work(tmp_path, monkeypatch):
    """With the reason that the system gives."""

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/temporary/name")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(EdgewardError, match=r"made in .* \(Read-only file system\)"):
        check_new(tmp_path / "b")


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_appears_meanwhile_is_not_replaced(tmp_path, kind):
    """Of two that write to one name, the second loses, and leaves nothing behind."""
    out = tmp_path / "out"

    def write():
        with new_directory(out) as directory:
            (directory / "file").write_text("second")
            if kind == "directory":
                out.mkdir()
                (out / "file").write_text("first")
            else:
                out.write_text("first")

    with pytest.raises(OutputExists, match="appeared"):
        write()
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "file" if kind == "directory" else out).read_text() == "first"


def test_others_can_read_the_result(tmp_path):
    """The server runs under another user: the directory is not private, as temporary ones are."""
    before = os.umask(0o022)
    try:
        with new_directory(tmp_path / "out") as directory:
            (directory / "file").write_text("x")
    finally:
        os.umask(before)

    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o644


def test_sealing_again_gives_the_same_bundle(path):
    """A manifest that is already there is replaced, by one of the newest version, and not listed."""
    seal(path, open_bundle(path).manifest)
    assert open_bundle(path).manifest.format_version == types.FORMAT_VERSION
    before = {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}
    seal(path, open_bundle(path).manifest)

    assert {each: each.read_bytes() for each in path.rglob("*") if each.is_file()} == before


def test_file_added_and_sealed_is_listed(path):
    """What lies in the directory when it is sealed belongs to the bundle."""
    (path / "report.html").write_text("<html></html>")
    seal(path, open_bundle_unverified(path))

    assert open_bundle(path).read("report.html") == b"<html></html>"


def open_bundle_unverified(path):
    return msgspec.json.decode((path / MANIFEST).read_bytes(), type=types.Manifest)


@pytest.mark.parametrize("name", ["a b", ".hidden", "sub/-x", "naïve", "x" * 256])
def test_name_that_cannot_be_opened_cannot_be_sealed(text, name):
    """The writer refuses what every reader would refuse."""
    if len(name) < 256:
        (text / name).parent.mkdir(exist_ok=True)
        (text / name).write_text("x")
    else:
        (text / "d").mkdir()
        (text / "d" / name[:254]).write_text("x")

    with pytest.raises(BundleDamaged, match="which no file of a bundle may be called"):
        seal(text, open_bundle_unverified(text))


def test_link_cannot_be_sealed(text, tmp_path):
    """A link would be refused by every reader, so it never gets into a bundle."""
    (tmp_path / "elsewhere").write_text("x")
    (text / "report.html").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(BundleDamaged, match=r"report\.html is not a plain file"):
        seal(text, open_bundle_unverified(text))


def test_manifest_beyond_its_limit_cannot_be_sealed(text):
    """The writer keeps to the limits of the reader."""
    sealed = open_bundle_unverified(text)
    endless = msgspec.structs.replace(sealed.provenance, data="x" * (16 << 20))

    with pytest.raises(BundleUnsupported, match="the limit is 16777216"):
        seal(text, msgspec.structs.replace(sealed, provenance=endless))


def test_not_a_number_cannot_be_sealed(text):
    """JSON has no NaN; a measurement that is one is found before the bundle is written."""
    sealed = open_bundle_unverified(text)
    variant = msgspec.structs.replace(sealed.variants[0], parity=float("nan"))

    with pytest.raises(BundleDamaged, match="parity"):
        seal(text, msgspec.structs.replace(sealed, variants=(variant,)))


# Opening: every byte is as it was sealed.


def test_bundles_of_every_version_open_for_ever(path, request):
    """What an earlier version wrote is read, and starts."""
    bundle = open_bundle(path)

    assert f"format-{bundle.manifest.format_version}-" in request.node.name
    assert bundle.manifest.files == {
        name: found for name, found in list_files(path).items() if name not in (MANIFEST, DIGEST)
    }
    assert load_model(path, device="cpu").manifest == bundle.manifest


def test_every_flipped_byte_is_found(path):
    """No byte of any file, manifest and digest included, can change unnoticed."""
    rng = np.random.default_rng(0)
    files = sorted(each for each in path.rglob("*") if each.is_file())

    for i in range(200):
        file = files[i % len(files)]
        data = bytearray(file.read_bytes())
        position = int(rng.integers(len(data)))
        data[position] ^= int(rng.integers(1, 256))
        kept = file.read_bytes()
        file.write_bytes(bytes(data))
        with pytest.raises(BundleDamaged, match=re.escape(file.name)):
            load_model(path, device="cpu")
        file.write_bytes(kept)
    assert open_bundle(path)


def test_damage_is_found_before_anything_starts(path):
    """Loading a model opens its bundle, and a bundle that is damaged is not run."""
    graph = path / "variants/fp32.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")

    with pytest.raises(BundleDamaged, match=r"variants/fp32\.onnx"):
        load_model(path, device="cpu")


def test_truncated_file_is_found(path):
    """A file that was cut is named, with both sizes."""
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        kept = file.read_bytes()
        for length in {0, 1, len(kept) // 2, len(kept) - 1}:
            file.write_bytes(kept[:length])
            with pytest.raises(BundleDamaged, match=re.escape(file.name)):
                open_bundle(path)
        file.write_bytes(kept + b"\n")
        with pytest.raises(BundleDamaged, match=re.escape(file.name)):
            open_bundle(path)
        file.write_bytes(kept)


def test_missing_file_is_found(path):
    """A file that is gone is named."""
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        kept = file.read_bytes()
        file.unlink()
        with pytest.raises(BundleError, match=re.escape(file.name)):
            open_bundle(path)
        file.write_bytes(kept)


@pytest.mark.parametrize("name", ["extra", "variants/extra.onnx", "new/extra", ".hidden", "manifest.json.bak"])
def test_unlisted_file_is_found(path, name):
    """A bundle holds nothing that its manifest does not name."""
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("x")

    with pytest.raises(BundleDamaged, match=re.escape(name)):
        open_bundle(path)


def test_nothing_but_a_bundle_is_a_bundle(tmp_path):
    """A folder without a manifest, a file and a name that is not there are no bundles, and the message says which."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file", "nothing"):
        with pytest.raises(BundleError, match=f"{name} is not a bundle"):
            open_bundle(tmp_path / name)


@pytest.mark.parametrize("name", [MANIFEST, DIGEST, "variants/fp32.onnx", "goldens/0.txt"])
def test_symbolic_link_is_refused(text, tmp_path, name):
    """A link to the very same bytes is still no file of the bundle: it could change behind its back."""
    (text / name).rename(tmp_path / "elsewhere")
    (text / name).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(BundleDamaged, match=re.escape(name)):
        open_bundle(text)


def test_linked_directory_is_refused(text, tmp_path):
    """A directory of the bundle that is a link is refused as well."""
    (text / "goldens").rename(tmp_path / "elsewhere")
    (text / "goldens").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(BundleDamaged, match="goldens"):
        open_bundle(text)


def test_link_to_a_bundle_is_followed(text, tmp_path):
    """The bundle's own name may be a link: that is how versions are switched."""
    (tmp_path / "current").symlink_to(text)

    assert open_bundle(tmp_path / "current").manifest.name == "mood"


@pytest.mark.parametrize("name", [MANIFEST, DIGEST, "goldens/0.txt"])
def test_pipe_is_refused_and_not_waited_for(text, name):
    """A named pipe would be read for ever."""
    (text / name).unlink()
    os.mkfifo(text / name)
    refused = []

    def attempt():
        with pytest.raises(BundleDamaged, match=re.escape(name)):
            open_bundle(text)
        refused.append(name)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert refused == [name]


@pytest.mark.parametrize(
    "name",
    ["../outside", "goldens/../../outside", "/etc/passwd", "goldens//0.txt", "./x", "", ".", "a\\b", "a\0b", "x" * 256],
)
def test_path_that_leaves_the_bundle_is_refused(text, tmp_path, name):
    """A manifest cannot name what is not below it, even with the right hash and the right seal."""
    (tmp_path / "outside").write_bytes(b"secret")
    sealed = read_manifest(text)
    sealed["files"][name] = entry(b"secret")
    write_manifest(text, sealed)

    with pytest.raises(BundleDamaged, match="which no file of a bundle may be called"):
        open_bundle(text)


@pytest.mark.parametrize(
    ("place", "name"),
    [("variants", "../outside"), ("goldens", "../outside"), ("goldens", "goldens/9.txt"), ("tensors", "../outside")],
)
def test_reference_to_what_is_not_listed_is_refused(text, tmp_path, place, name):
    """Variants and goldens refer to files of the bundle, and to no others."""
    (tmp_path / "outside").write_bytes(b"secret")
    sealed = read_manifest(text)
    if place == "tensors":
        sealed["goldens"][0]["tensors"]["input_ids"] = name
    else:
        sealed[place][0]["file"] = name
    write_manifest(text, sealed)

    with pytest.raises(BundleDamaged, match=f"files does not list {re.escape(name)}"):
        open_bundle(text)


def test_reading_what_is_not_listed_is_refused(text, tmp_path):
    """An open bundle hands out its own files only."""
    (tmp_path / "outside").write_bytes(b"secret")

    with pytest.raises(BundleDamaged, match="does not list"):
        open_bundle(text).read("../outside")


def test_file_changed_after_opening_is_found(text):
    """What is used is what was sealed, also when a file changes between opening and reading."""
    bundle = open_bundle(text)
    file = text / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"good", b"evil"))

    with pytest.raises(BundleDamaged, match=r"tokenizer\.json"):
        bundle.read("tokenizer.json")


# The manifest: every key known, every value possible.


def change(sealed, where, value):
    *parents, last = where
    for key in parents:
        sealed = sealed[key]
    if value is ...:
        del sealed[last]
    else:
        sealed[last] = value


WRONG = [
    (["name"], "a b"),
    (["name"], ""),
    (["name"], "../up"),
    (["name"], "x" * 129),
    (["name"], "line\n"),
    (["name"], ...),
    (["version"], 0),
    (["version"], -1),
    (["version"], 2**31),
    (["version"], 10**400),
    (["version"], "1"),
    (["version"], 1.5),
    (["version"], True),
    (["surprise"], 1),
    (["variants", 0, "surprise"], 1),
    (["provenance", "surprise"], 1),
    (["files", "goldens/0.txt", "mode"], 1),
    (["input", "type"], "audio"),
    (["input", "buckets"], []),
    (["input", "buckets"], [0, 8]),
    (["input", "max_bytes"], 0),
    (["tasks"], []),
    (["tasks", 0, "kind"], "ranking"),
    (["tasks", 0, "labels"], []),
    (["tasks", 0, "labels"], ["same", "same", "other"]),
    (["tasks", 0, "name"], ""),
    (["variants"], []),
    (["variants", 0, "tolerance"], -1),
    (["variants", 0, "tolerance"], None),
    (["variants", 0, "device"], "tpu"),
    (["input", "pair"], ""),
    (["input", "pair"], "text"),
    (["variants", 0, "gate"], {}),
    (["goldens"], []),
    (["goldens", 0, "logits"], {}),
    (["goldens", 0, "logits", "fp32"], {}),
    (["goldens", 0, "logits", "fp32", "logits"], []),
    (["goldens", 0, "logits", "fp32", "logits"], [1.0, 2.0]),
    (["goldens", 0, "logits", "fp32", "logits"], [1.0, 2.0, None]),
    (["files", "tokenizer.json", "bytes"], -1),
    (["files", "tokenizer.json", "sha256"], ""),
]


@pytest.mark.parametrize(("where", "value"), WRONG, ids=[f"{'.'.join(map(str, w))}={v!r:.30}" for w, v in WRONG])
def test_impossible_manifest_is_refused(text, where, value):
    """A manifest that is sealed, but says what no bundle can be, is refused by its file's name."""
    sealed = read_manifest(text)
    change(sealed, where, value)
    write_manifest(text, sealed)

    with pytest.raises(BundleDamaged, match=re.escape(str(text))):
        open_bundle(text)


WORDS = {"type": "words", "column": "t", "segmenter": "jieba", "lowercase": True, "max_words": 4, "buckets": [2, 4]}
VECTOR = {"type": "vector", "column": "v", "size": 2}


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        *[
            (WORDS, wrong)
            for wrong in (
                {"segmenter": "other"},
                {"lowercase": 1},
                {"hmm": None},
                {"buckets": []},
                {"max_words": 3},
                {"max_bytes": 0},
                {"names": []},
            )
        ],
        *[
            (VECTOR, wrong)
            for wrong in ({"size": 0}, {"size": 2**20 + 1}, {"size": 10**400}, {"names": ["one"]}, {"hmm": True})
        ],
    ],
)
def test_impossible_input_is_refused(text, spec, wrong):
    """Of every type of input, what no example could be."""
    sealed = read_manifest(text)
    sealed["input"] = spec
    write_manifest(text, sealed)
    assert open_bundle(text).manifest.input.column == spec["column"]

    sealed["input"] = spec | wrong
    write_manifest(text, sealed)
    with pytest.raises(BundleDamaged, match=r"manifest\.json is not a manifest"):
        open_bundle(text)


def test_gate_is_of_a_task_that_there_is(text):
    """A record of several tasks says which it is of."""
    sealed = open_bundle(text).manifest
    record = types.GateRecord(
        verdict="PASS", task="mood", metric="accuracy", examples=100, reference=0.9, served=0.9, drop=0.0,
        drop_upper=0.01, budget=0.02, confidence=0.95, disagreement=0.0, examples_needed=None,
    )  # fmt: skip
    gated = [msgspec.structs.replace(sealed.variants[0], gate=msgspec.structs.replace(record, task=task))
             for task in ("mood", "other")]  # fmt: skip
    seal(text, msgspec.structs.replace(sealed, variants=(gated[0],)))
    assert open_bundle(text).manifest.variants[0].gate == record

    with pytest.raises(BundleDamaged, match="of a task that there is not"):
        seal(text, msgspec.structs.replace(sealed, variants=(gated[1],)))


@pytest.mark.parametrize("twice", ["variants", "tasks"])
def test_one_name_for_two_is_refused(text, twice):
    """Names tell variants and tasks apart."""
    sealed = read_manifest(text)
    sealed[twice] *= 2
    write_manifest(text, sealed)

    with pytest.raises(BundleDamaged, match="its own name"):
        open_bundle(text)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"\xff\xfe",
        b'{"format": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": "edgeward-bundle", "format_version": 1}',
        b'{"format": "edgeward-bundle", "format_version": NaN}',
        b'{"format": "edgeward-bundle", "format_version": ' + b"9" * 10_000 + b"}",
        '{"format": "edgeward-bundle", "format_version": 1}'.encode("utf-16"),
    ],
    ids=range(14),
)
def test_what_is_no_manifest_is_refused(text, data):
    """Whatever the sealed bytes are, the answer is one of ours."""
    write_manifest(text, data)

    with pytest.raises(BundleError, match=r"manifest\.json|format version"):
        open_bundle(text)


def test_key_that_occurs_twice_is_refused(text):
    """Two readers could otherwise read two different bundles."""
    data = (text / MANIFEST).read_bytes()
    write_manifest(text, data.replace(b'"version": 1,', b'"version": 1,\n "version": 2,', 1))

    with pytest.raises(BundleDamaged, match="twice"):
        open_bundle(text)


@pytest.mark.parametrize("version", [0, 4, 99, "1", None, True, 1.5])
def test_other_format_version_is_unsupported(text, version):
    """A format that this version does not know is said to be one, before anything else of it is read."""
    sealed = {"format": "edgeward-bundle", "format_version": version, "whatever": {"comes": "next"}}
    write_manifest(text, sealed)

    with pytest.raises(BundleError) as refused:
        open_bundle(text)
    if version is not True:  # which Python holds for 1, and the types do not
        assert isinstance(refused.value, BundleUnsupported)
        assert "docs/bundle-format.md" in str(refused.value)


def test_other_format_is_unsupported(text):
    """Another tool's manifest is not taken for ours."""
    write_manifest(text, {"format": "something-else", "format_version": 1})

    with pytest.raises(BundleUnsupported, match="something-else"):
        open_bundle(text)


def test_limits_of_the_format_hold(text):
    """Too large a manifest, too many files and too large a file are refused without reading them."""
    sealed = read_manifest(text)
    files = sealed["files"]
    sealed["files"] = {**files, **{f"f{i}": entry(b"") for i in range(10_000)}}
    write_manifest(text, sealed)
    with pytest.raises(BundleUnsupported, match="10000"):
        open_bundle(text)

    sealed["files"] = {**files, "huge": {"sha256": "0" * 64, "bytes": (8 << 30) + 1}}
    write_manifest(text, sealed)
    with (text / "huge").open("wb") as file:
        file.truncate((8 << 30) + 1)  # sparse: takes no space
    with pytest.raises(BundleUnsupported, match="huge has 8589934593 bytes"):
        open_bundle(text)

    write_manifest(text, b" " * ((16 << 20) + 1))
    with pytest.raises(BundleUnsupported, match=r"manifest\.json is larger than 16777216 bytes"):
        open_bundle(text)


def test_order_and_spacing_of_the_manifest_do_not_matter(text):
    """JSON objects have no order: a manifest written by another tool is the same manifest."""

    def reversed_keys(value):
        if isinstance(value, dict):
            return {key: reversed_keys(value[key]) for key in reversed(value)}
        return [reversed_keys(each) for each in value] if isinstance(value, list) else value

    before = open_bundle(text).manifest
    write_manifest(text, json.dumps(reversed_keys(read_manifest(text)), indent=None).encode())

    assert open_bundle(text).manifest == before


@pytest.mark.parametrize(
    "line",
    ["", "0" * 64, "{digest}", "{digest}  manifest.json", "{digest} manifest.json\n", "{digest}  manifest.json\n\n"],
)
def test_digest_is_exactly_one_line(text, line):
    """manifest.sha256 has one form: what sha256sum writes."""
    digest = hashlib.sha256((text / MANIFEST).read_bytes()).hexdigest()
    (text / DIGEST).write_text(line.format(digest=digest))

    with pytest.raises(BundleDamaged, match=r"manifest\.sha256"):
        open_bundle(text)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_agrees(path):
    """The digest can be checked without this program."""
    done = subprocess.run(["sha256sum", "-c", DIGEST], cwd=path, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "manifest.json: OK\n")


def test_every_key_is_on_the_page_of_the_format():
    """docs/bundle-format.md is normative, so it names every type's every key and tag."""
    page = (ROOT / "docs/bundle-format.md").read_text()
    records = [each for each in vars(types).values() if isinstance(each, type) and issubclass(each, types.Record)]
    named = set()
    for record in records:
        fields = msgspec.structs.fields(record)
        named |= {field.encode_name for field in fields}
        named |= {record.__struct_config__.tag, record.__struct_config__.tag_field} - {None}

    assert {name for name in named if f"`{name}`" not in page} == set()


def test_a_folder_is_as_open_as_its_files(tmp_path):
    """Whoever keeps files from others by the umask means the folder as well."""
    before = os.umask(0o077)
    try:
        with new_directory(tmp_path / "out") as folder:
            (folder / "file").touch()
    finally:
        os.umask(before)

    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o600
