"""Where to train."""

from typing import Literal

import structlog
import torch

from bundle.errors import DeviceUnavailable

log = structlog.get_logger()

Device = Literal["auto", "cpu", "cuda"]


def choose_device(wanted: Device) -> torch.device:
    """The device that was asked for; "auto" takes CUDA where it works, else the CPU, and logs which.

    Raises:
        DeviceUnavailable: CUDA was asked for and cannot be used.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        built = f"is built for CUDA {torch.version.cuda}, but finds no GPU" if torch.version.cuda else "has no CUDA"
        raise DeviceUnavailable(f"CUDA cannot be used: this torch {torch.__version__} {built}. Try --device cpu.")
    device = torch.device("cuda" if available else "cpu")
    if wanted == "auto":
        log.info("device chosen", device=device.type)
    return device
