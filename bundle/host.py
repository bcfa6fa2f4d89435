"""What this process may use of this machine: cores and instruction set."""

import ctypes
import os
import platform
from functools import cache
from pathlib import Path


def cpu_count() -> int:
    """Cores this process may use: its affinity mask, cut to the CPU quota of its container.

    A quota of 1.5 cores gives 1: a second thread would be throttled half of the time.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The CPU quota in cores of the tightest control group around this process (versions 1 and 2), or None."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            quotas += [_quota_v2(group) for group in _with_parents(cgroups, path)]
        elif "cpu" in controllers.split(","):
            quotas += [_quota_v1(group) for group in _with_parents(cgroups / "cpu", path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _with_parents(root: Path, path: str) -> list[Path]:
    # Inside a container the path may be the host's and not exist below root: root itself is then the container's group.
    group = root / path.lstrip("/")
    return [root, *(p for p in [group, *group.parents] if p.is_relative_to(root) and p != root)]


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
        return None if quota < 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None


def trim_memory() -> None:
    """Give back what the C library keeps of freed memory: after a model was loaded or freed that can be half of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim:
        trim(0)


def isa_class(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The instruction-set class that decides which int8 kernels run, and so how int8 rounds and saturates.

    On x86-64 without VNNI the int8 products saturate at 16 bits, and the same file gives other answers.
    """
    machine = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64"}.get(
        platform.machine().lower(), platform.machine().lower()
    )
    flags: set[str] = set()
    try:
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                flags.update(line.split(":", 1)[1].split())
                break
    except OSError:
        return machine
    ranked = {"x86-64": ["avx512_vnni", "avx_vnni", "avx512f", "avx2"], "arm64": ["i8mm", "asimddp"]}
    best = next((flag for flag in ranked.get(machine, []) if flag in flags), None)
    return f"{machine}-{best.replace('_', '-')}" if best else machine


@cache
def products_saturate() -> bool:
    """Whether ONNX Runtime's int8 kernels add up products in 16 bits here: on x86-64 without VNNI."""
    return isa_class().startswith("x86-64") and not isa_class().endswith("vnni")


def gpu_class() -> str | None:
    """The compute capability of the first GPU, such as "sm90", as the CUDA driver gives it; None without a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    if driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device):
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device):
        return None
    return f"sm{major.value}{minor.value}"


def machine_class(device: str) -> str:
    """What a variant for this device was gated on, when it was gated here: `gpu_class` of a GPU, else `isa_class`."""
    return isa_class() if device == "cpu" else gpu_class() or "gpu"


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, for reports."""
    try:
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def installed_versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those of the distributions that are installed, for provenance."""
    from importlib import metadata  # a megabyte, of which a server has no need

    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
