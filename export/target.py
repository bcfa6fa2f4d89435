"""What `--target` means, and whether this machine is it: what is measured here is true here."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import TensorProto, helper

from bundle.errors import DeviceUnavailable
from bundle.host import isa_class, machine_class
from bundle.log import log
from bundle.model import ADD
from bundle.session import Session
from export.config import TargetName

REMEDY = f"What is gated on one machine says little of another: run this on that machine, {ADD}."


@dataclass(frozen=True)
class Target:
    """What is compiled for.

    Attributes:
        device: of bundle.session.
        isa: class of this machine, as a variant's `isa`.
        signed: whether int8 activations are signed, as ARM64's kernels have it; x86's multiply uint8 with int8.
    """

    device: Literal["cpu", "cuda", "tensorrt"]
    isa: str
    signed: bool


def resolve(name: TargetName) -> Target:
    """What a name means on this machine. `auto` is CUDA where it works, else the CPU, and the log says which.

    Raises:
        DeviceUnavailable: this machine is not that target.
    """
    if name == "auto":
        try:
            target = _probed("cuda")
        except DeviceUnavailable as error:
            target = _cpu()
            log.info("target chosen", device="cpu", isa=target.isa, because=str(error))
        else:
            log.info("target chosen", device=target.device, isa=target.isa)
        return target
    if name in ("cuda", "tensorrt"):
        try:
            return _probed(name)
        except DeviceUnavailable as error:
            raise DeviceUnavailable(f"--target {name} is not this machine: {error} {REMEDY}") from error
    return _checked(name, _cpu())


def cpu_name(isa: str) -> TargetName:
    """Which of the names for a CPU is that of an instruction set; `cpu` where no other is."""
    if isa.startswith("arm64"):
        return "cpu-arm64"
    if isa.startswith("x86-64-") and isa.endswith("vnni"):
        return "cpu-vnni"
    return "cpu-avx2" if isa in ("x86-64-avx2", "x86-64-avx512f") else "cpu"


def _cpu() -> Target:
    isa = isa_class()
    return Target("cpu", isa, signed=isa.startswith("arm64"))


def _checked(name: TargetName, target: Target) -> Target:
    here = cpu_name(target.isa)
    if name not in ("cpu", here):
        raise DeviceUnavailable(f"--target {name} is not this machine, whose CPU is {target.isa} ({here}). {REMEDY}")
    return target


def _probed(device: Literal["cuda", "tensorrt"]) -> Target:
    """Runs a graph there: a provider that is installed need not work."""
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    inputs, outputs = ([helper.make_tensor_value_info(each, TensorProto.FLOAT, [2, 2])] for each in "xy")
    model = helper.make_model(
        helper.make_graph([node], "probe", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    Session(model.SerializeToString(), device=device).run({"x": np.eye(2, dtype=np.float32)})
    return Target(device, machine_class(device), signed=True)
