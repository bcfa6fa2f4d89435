"""Where to train."""

import os
from typing import Literal

import torch

from bundle.errors import DeviceUnavailable
from bundle.log import log

Device = Literal["auto", "cpu", "cuda"]
Arithmetic = Literal["fp32", "bf16", "fp16"]


def choose_device(wanted: Device) -> torch.device:
    """The device that was asked for; "auto" takes CUDA where it works, else the CPU, and logs which.

    Under torchrun each process of a machine has a GPU of its own.

    Raises:
        DeviceUnavailable: CUDA was asked for and cannot be used, or there are fewer GPUs than processes.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        built = f"is built for CUDA {torch.version.cuda}, but finds no GPU" if torch.version.cuda else "has no CUDA"
        raise DeviceUnavailable(f"CUDA cannot be used: this torch {torch.__version__} {built}. Try --device cpu.")
    device = _gpu() if available else torch.device("cpu")
    if wanted == "auto":
        log.info("device chosen", device=str(device))
    return device


def _gpu() -> torch.device:
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise DeviceUnavailable(
            f"process {number} of this machine has no GPU: there are {there}. Start {there} processes, or --device cpu."
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def choose_precision(wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Arithmetic:
    """What "auto" is on a device: bf16 on a GPU that has it, fp16 on any other, fp32 on a CPU."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
