from pathlib import Path

import onnxruntime
import pytest

from bundle.errors import DeviceUnavailable
from bundle.host import isa_class
from bundle.log import captured
from export import target

CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/dev/nvidiactl").exists()


@pytest.mark.parametrize(
    ("isa", "name"),
    [
        ("x86-64-avx512-vnni", "cpu-vnni"),
        ("x86-64-avx-vnni", "cpu-vnni"),
        ("x86-64-avx512f", "cpu-avx2"),
        ("x86-64-avx2", "cpu-avx2"),
        ("x86-64", "cpu"),
        ("arm64-i8mm", "cpu-arm64"),
        ("arm64", "cpu-arm64"),
        ("riscv64", "cpu"),
    ],
)
def test_instruction_set_has_one_name(isa, name):
    """VNNI decides on x86-64: without it there are other int8 kernels, whatever else the CPU has."""
    assert target.cpu_name(isa) == name


@pytest.mark.parametrize("name", ["cpu", "cpu-avx2", "cpu-vnni", "cpu-arm64"])
def test_only_this_machine_can_be_compiled_for(name):
    """The name of this CPU is a target; that of another is an error which says what to run where."""
    if name in ("cpu", target.cpu_name(isa_class())):
        resolved = target.resolve(name)
        assert (resolved.device, resolved.isa) == ("cpu", isa_class())
        assert resolved.signed == isa_class().startswith("arm64")
        return
    with pytest.raises(DeviceUnavailable, match=f"{name} is not this machine, whose CPU is .* --add-to BUNDLE"):
        target.resolve(name)


@pytest.mark.parametrize("isa", ["x86-64-avx512-vnni", "arm64-asimddp"])
def test_other_kernels_are_refused_where_newer_ones_run(isa):
    """A CPU with VNNI can run what one without it runs, and measure nothing of it."""
    with pytest.raises(DeviceUnavailable, match=f"cpu-avx2 is not this machine, whose CPU is {isa}"):
        target._checked("cpu-avx2", target.Target("cpu", isa, signed=False))


@pytest.mark.skipif(CUDA, reason="CUDA works here")
@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_gpu_that_is_not_there_is_refused(name):
    """A GPU is a target where one works, and is never replaced by the CPU."""
    with pytest.raises(DeviceUnavailable, match=f"--target {name} is not this machine: .* --add-to BUNDLE"):
        target.resolve(name)


@pytest.mark.skipif(CUDA, reason="CUDA works here")
def test_auto_is_the_cpu_where_there_is_no_gpu():
    """Left to choose, export compiles for what is there, and the log says what that is and why."""
    with captured() as logs:
        assert target.resolve("auto") == target.resolve("cpu")
    (line,) = logs
    assert (line["event"], line["device"], line["isa"]) == ("target chosen", "cpu", isa_class())
    assert "CUDA" in line["because"]
    assert "--target" not in line["because"]


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="no GPU, or an onnxruntime without CUDA")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_gpu_is_a_target(name):
    """With a GPU, auto is CUDA, and its class is its compute capability."""
    assert target.resolve(name).device == "cuda"
    assert target.resolve(name).isa.startswith("sm")
