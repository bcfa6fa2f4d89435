import json
import shutil
from pathlib import Path

import msgspec
import onnxruntime
import pytest

from bundle import store
from bundle.errors import DeviceUnavailable, SelfTestFailed
from bundle.host import isa_class
from bundle.store import open_bundle
from edgeward import bundles

CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/dev/nvidiactl").exists()
POINTS = Path(__file__).parent / "golden" / "format-3-variants"


@pytest.fixture
def several(tmp_path):
    """A bundle whose second variant, for another class of machine, has golden logits that no run gives here."""
    path = Path(shutil.copytree(POINTS, tmp_path / "bundle"))

    def seal(first="here", second="elsewhere"):
        sealed = open_bundle(POINTS).manifest
        names = {sealed.variants[0].name: first, sealed.variants[1].name: second}
        variants = tuple(
            msgspec.structs.replace(one, isa=isa_class() if names[one.name] == "here" else "other")
            for one in sealed.variants[:2]
        )
        goldens = tuple(
            msgspec.structs.replace(each, logits=each.logits | {variants[1].name: {"logits": (9.0, 9.0, 9.0)}})
            for each in sealed.goldens
        )
        store.seal(path, msgspec.structs.replace(sealed, variants=variants, goldens=goldens))
        return path

    return seal


def verified(capsys, *arguments, **options):
    bundles.verify(*arguments, json=True, **options)
    return json.loads(
        capsys.readouterr().out.splitlines()[-1]
    )  # the log is on stdout, too, unless the command set it up


def test_every_variant_is_shown(capsys):
    """Device, class of machine, verdict, latency, throughput and origin of each; the name of none is cut."""
    bundles.inspect(POINTS)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())

    for one in open_bundle(POINTS).manifest.variants:
        assert f"{one.name} {one.device} {one.isa} 0.10 1.00 20000 yes" in shown
    assert "PASS: macro_f1 0.9000 -> 0.9000 on 1000 examples, drop at most 0.0050" in shown
    assert "2026-11-21 on any" in shown
    assert "2026-11-22 on another" in shown


@pytest.mark.skipif(CUDA, reason="a GPU works here")
def test_what_cannot_run_here_is_said(capsys):
    """Variants for the CPU are tested, whatever they were gated on; those for a GPU are named with the reason."""
    found = verified(capsys, POINTS)

    reproduced = {one["variant"]: one["reproduced"] for one in found["variants"]}
    assert reproduced == {"fp32": True, "fp32.arm64-asimddp": True, "fp16.sm90": None, "fp16-tensorrt.sm90": None}
    assert all("ExecutionProvider" in one["remark"] for one in found["variants"] if one["reproduced"] is None)
    assert (found["variant"], found["device"], found["goldens"]) == ("fp32", "cpu", 2)


def test_people_are_told_the_same(capsys):
    """The table has a line for each variant of the device, after the sentence on what is served."""
    bundles.verify(POINTS, device="cpu")
    shown = " ".join(capsys.readouterr().out.split())

    assert "6 files as sealed; 2 golden examples reproduced by fp32 on cpu." in shown
    assert "served here" in shown
    assert "fp32.arm64-asimddp │ cpu │ arm64-asimddp │ yes │" in shown
    assert "cuda" not in shown


def test_variant_for_another_machine_may_differ_here(capsys, several):
    """It is not served here, so that it gives other answers is no fault of the bundle; it is said."""
    found = verified(capsys, several(), device="cpu")

    assert [one["reproduced"] for one in found["variants"]] == [True, False]
    assert "not served here" in found["variants"][1]["remark"]


def test_variant_for_this_machine_must_not_differ(several):
    """Two variants for this class of machine: that the second one is not served is no excuse."""
    with pytest.raises(SelfTestFailed, match=r"fp32\.arm64-asimddp"):
        bundles.verify(several(second="here"), device="cpu")


def test_variant_that_is_served_must_not_differ(several):
    """Nor is it one that nothing was gated here: what would be served has to reproduce its golden examples."""
    with pytest.raises(SelfTestFailed, match=r"fp32\.arm64-asimddp"):
        bundles.verify(several(first="elsewhere", second="here"), device="cpu")


@pytest.mark.skipif(CUDA, reason="a GPU works here")
def test_device_that_is_asked_for_must_be_there():
    """Who verifies a GPU's variant is told when there is no GPU."""
    with pytest.raises(DeviceUnavailable):
        bundles.verify(POINTS, device="cuda")
