import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bundle import manifest, store
from bundle.errors import BundleError, OutputExists, SelfTestFailed
from bundle.host import isa_class
from bundle.model import load_model
from bundle.session import Session
from bundle.store import open_bundle
from export.add import add_variant, check_same_model
from tests.golden import make_format_3 as golden

FOLDER = Path(__file__).parent / "golden"
POINTS, MOODS = FOLDER / "format-3-variants", FOLDER / "format-1-text"
GRAPH = golden.graph("fp32")
BUILT = msgspec.structs.replace(open_bundle(POINTS).manifest.provenance, cpu="the one that was added")


def compiled(isa="riscv64", name="int8-static", ratio=0.5, **changes):
    """A variant as export would describe it."""
    fp32 = open_bundle(POINTS).manifest.variants[0]
    latency = msgspec.structs.replace(fp32.latency, ratio=ratio)
    described = msgspec.structs.replace(fp32, name=name, file="model.onnx", precision="int8", isa=isa, latency=latency)
    return msgspec.structs.replace(described, **changes)


def add(path, out, variant, graph=GRAPH):
    session = Session(graph, device="cpu", threads=1)
    return add_variant(open_bundle(path), variant, graph, session, report=b"{}", built=BUILT, out=out)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_new_bundle_holds_the_old_one_and_the_variant(tmp_path):
    """Every file, variant and golden logit is kept; the variant comes with its graph, its report and its provenance."""
    before = contents(POINTS)
    added = add(POINTS, tmp_path / "out", compiled())
    old, new = open_bundle(POINTS).manifest, open_bundle(tmp_path / "out").manifest

    assert contents(POINTS) == before
    kept = {name: data for name, data in before.items() if name not in (store.MANIFEST, store.DIGEST)}
    assert kept.items() <= contents(tmp_path / "out").items()
    assert new.files.keys() - old.files.keys() == {"model.int8-static.riscv64.onnx", "report.int8-static.riscv64.json"}
    assert (tmp_path / "out" / added.file).read_bytes() == GRAPH
    assert new.variants == (*old.variants, added)
    assert (added.name, added.built) == ("int8-static.riscv64", BUILT)
    for one, other in zip(old.goldens, new.goldens, strict=True):
        assert other.logits == {**one.logits, added.name: one.logits["fp32"]}
    ignored = {"variants": (), "goldens": (), "files": {}}
    assert msgspec.structs.replace(new, **ignored) == msgspec.structs.replace(old, **ignored)


def test_added_variant_is_served_on_its_machine(tmp_path):
    """What was added here is proved here, and comes before what was gated elsewhere."""
    add(POINTS, tmp_path / "out", compiled(isa_class()))
    model = load_model(tmp_path / "out", device="cpu")

    assert model.variant.name == f"int8-static.{isa_class()}"
    assert model.variant.built == BUILT


def test_bundle_of_an_old_format_becomes_one_of_the_newest(tmp_path):
    """A bundle that an earlier version wrote can be added to."""
    variant = msgspec.structs.replace(open_bundle(MOODS).manifest.variants[0], isa="arm64-i8mm")
    add(MOODS, tmp_path / "out", variant, (MOODS / "variants/fp32.onnx").read_bytes())

    assert open_bundle(tmp_path / "out").manifest.format_version == manifest.FORMAT_VERSION
    assert [each.name for each in open_bundle(tmp_path / "out").manifest.variants] == ["fp32", "fp32.arm64-i8mm"]


@pytest.mark.parametrize(("ratio", "first"), [(0.5, "int8-static.x86-64-avx2"), (1.5, "fp32")])
def test_faster_variant_of_a_machine_comes_first(tmp_path, ratio, first):
    """Of two that were proved on one class of machine, the faster one is served there."""
    add(POINTS, tmp_path / "out", compiled("x86-64-avx2", ratio=ratio))
    names = [each.name for each in open_bundle(tmp_path / "out").manifest.variants if each.isa == "x86-64-avx2"]

    assert sorted(names) == ["fp32", "int8-static.x86-64-avx2"]
    assert names[0] == first


@pytest.mark.parametrize(
    ("device", "isa", "name"),
    [("cpu", "x86-64-avx2", "fp32"), ("cpu", "arm64-asimddp", "fp32"), ("cuda", "sm90", "fp16")],
)
def test_variant_that_is_there_is_refused(tmp_path, device, isa, name):
    """One name is one graph for a device and class of machine, whether it was there first or added."""
    with pytest.raises(BundleError, match=f"has a variant {name}.* for {device} on {isa} already"):
        add(POINTS, tmp_path / "out", compiled(isa, name, device=device))
    assert not (tmp_path / "out").exists()


def test_name_that_is_taken_on_another_device_is_refused(tmp_path):
    """Two variants never share a name, nor a file."""
    with pytest.raises(BundleError, match=r"something called fp16\.sm90 already"):
        add(POINTS, tmp_path / "out", compiled("sm90", "fp16", device="tensorrt"))


def test_other_preprocessing_is_refused(tmp_path):
    """Where the golden examples become other tensors, nothing is added."""
    copied = Path(shutil.copytree(POINTS, tmp_path / "bundle"))
    np.save(copied / "goldens/1.raw.features.npy", np.ones(4, np.float32))
    store.seal(copied, open_bundle(POINTS).manifest)

    with pytest.raises(SelfTestFailed, match=r"goldens/1\.raw is preprocessed to another features"):
        add(copied, tmp_path / "out", compiled())
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_replaced(tmp_path):
    """The new bundle needs a name of its own: not even the old one is written over."""
    with pytest.raises(OutputExists):
        add(POINTS, tmp_path, compiled())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "1" * 64}, "what differs: the checkpoint, 111111111111 instead of 000000000000"),
        ({"tasks": (manifest.Multiclass(name="side", labels=("left", "right")),)}, "what differs: the tasks"),
        ({"spec": manifest.VectorInput(column="other", size=4)}, "what differs: the input"),
    ],
)
def test_other_model_is_refused(changes, message):
    """Variants of one bundle are compiled from one checkpoint, and take and answer the same."""
    sealed = open_bundle(POINTS).manifest
    same = {"spec": sealed.input, "tasks": sealed.tasks, "sha256": sealed.provenance.checkpoint_sha256}
    check_same_model(open_bundle(POINTS), **same)

    with pytest.raises(BundleError, match=message):
        check_same_model(open_bundle(POINTS), **(same | changes))
