import ctypes
import os
import platform
import subprocess
import sys

import pytest

from bundle.host import cpu_count, cpu_name, cpu_quota, gpu_class, isa_class, machine_class, products_saturate


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def quota(tmp_path):
    """The quota of a process in the groups that the files describe."""

    def measure(membership, **files):
        write(tmp_path / "membership", membership)
        for name, text in files.items():
            write(tmp_path / "cgroup" / name, text)
        return cpu_quota(tmp_path / "cgroup", tmp_path / "membership")

    return measure


def test_version_2_quota(quota):
    """cpu.max is quota and period in microseconds."""
    assert quota("0::/app\n", **{"app/cpu.max": "150000 100000\n"}) == 1.5


def test_version_2_without_limit(quota):
    """The word max means none."""
    assert quota("0::/app\n", **{"app/cpu.max": "max 100000\n"}) is None


def test_tightest_parent_counts(quota):
    """A limit anywhere above holds for everything below it."""
    files = {
        "cpu.max": "max 100000\n",
        "a/cpu.max": "200000 100000\n",
        "a/b/cpu.max": "max 100000\n",
        "a/b/c/cpu.max": "400000 100000\n",
        "other/cpu.max": "10000 100000\n",
    }

    assert quota("0::/a/b/c\n", **files) == 2


def test_container_sees_its_group_as_the_root(quota):
    """Inside a container the path may be the host's; the mounted root is then the group."""
    assert quota("0::/kubepods/pod1/abc\n", **{"cpu.max": "50000 100000\n"}) == 0.5


def test_version_1_quota(quota):
    """The two files of version 1, in the hierarchy of the cpu controller."""
    files = {"cpu/app/cpu.cfs_quota_us": "300000\n", "cpu/app/cpu.cfs_period_us": "100000\n"}

    assert quota("5:memory:/app\n4:cpu,cpuacct:/app\n1:name=systemd:/x\n0::/\n", **files) == 3


def test_version_1_without_limit(quota):
    """-1 means none."""
    files = {"cpu/app/cpu.cfs_quota_us": "-1\n", "cpu/app/cpu.cfs_period_us": "100000\n"}

    assert quota("4:cpu,cpuacct:/app\n", **files) is None


def test_cpuset_is_not_cpu(quota):
    """A controller whose name merely begins with cpu has no quota."""
    files = {"cpu/app/cpu.cfs_quota_us": "100000\n", "cpu/app/cpu.cfs_period_us": "100000\n"}

    assert quota("4:cpuset:/app\n", **files) is None


@pytest.mark.parametrize("text", ["", "max\n", "garbage\n", "1 2 3\n", "x y\n", "100000 0\n"])
def test_unreadable_quota_is_none(quota, text):
    """A file that is not understood limits nothing."""
    assert quota("0::/app\n", **{"app/cpu.max": text}) is None


def test_missing_groups_are_no_quota(tmp_path, quota):
    """Without control groups there is no limit."""
    assert quota("0::/gone\n") is None
    assert cpu_quota(tmp_path, tmp_path / "nothing") is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_affinity_counts():
    """A process that is pinned to one core has one core."""
    program = (
        "import os, bundle.host\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "print(bundle.host.cpu_count())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "1\n"


def test_there_is_always_a_core():
    """Half a core of quota still runs one thread, and no quota gives more than the machine has."""
    assert 1 <= cpu_count() <= os.cpu_count()


X86 = "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nflags\t\t: fpu sse2 {}\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("machine", "text", "expected"),
    [
        ("x86_64", X86.format("avx2 avx512f avx512_vnni avx_vnni"), "x86-64-avx512-vnni"),
        ("x86_64", X86.format("avx2 avx_vnni"), "x86-64-avx-vnni"),
        ("AMD64", X86.format("avx2 avx512f"), "x86-64-avx512f"),
        ("x86_64", X86.format("avx avx2"), "x86-64-avx2"),
        ("x86_64", X86.format("avx"), "x86-64"),
        ("aarch64", ARM.format("asimddp i8mm"), "arm64-i8mm"),
        ("arm64", ARM.format("asimddp"), "arm64-asimddp"),
        ("aarch64", ARM.format("crc32"), "arm64"),
        ("riscv64", "isa\t: rv64imafdc\n", "riscv64"),
    ],
)
def test_instruction_set_names_the_best_int8_kernel(tmp_path, monkeypatch, machine, text, expected):
    """The class is the best of the instruction sets that decide how int8 rounds."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    write(tmp_path / "cpuinfo", text)

    assert isa_class(tmp_path / "cpuinfo") == expected


def test_instruction_set_without_cpuinfo(tmp_path, monkeypatch):
    """Where nothing can be read, the class is the architecture."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    assert isa_class(tmp_path / "nothing") == "x86-64"


@pytest.mark.parametrize(
    ("isa", "saturate"),
    [
        ("x86-64-avx512-vnni", False),
        ("x86-64-avx-vnni", False),
        ("x86-64-avx2", True),
        ("x86-64", True),
        ("arm64", False),
    ],
)
def test_products_saturate_on_x86_without_vnni(isa, saturate, monkeypatch):
    """There the exact kernels have to be asked for; elsewhere asking would only cost time."""
    monkeypatch.setattr("bundle.host.isa_class", lambda: isa)
    products_saturate.cache_clear()
    try:
        assert products_saturate() is saturate
    finally:
        products_saturate.cache_clear()


def test_processor_has_a_name(tmp_path):
    """The report says what it was measured on, or at least the architecture."""
    write(tmp_path / "cpuinfo", X86)

    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 2.00GHz"
    assert cpu_name(tmp_path / "nothing")


class Driver:
    """What the CUDA driver's functions do, for a GPU of compute capability 8.9; or they fail."""

    def __init__(self, status=0):
        self.status = status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGet(self, device, ordinal):
        return self.status

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: 9}[attribute]
        return self.status


@pytest.mark.parametrize(("status", "expected"), [(0, "sm89"), (100, None)])
def test_gpu_is_named_by_its_compute_capability(monkeypatch, status, expected):
    """The class of a GPU is what the driver says of the first one; a driver without a GPU gives none."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(status))

    assert gpu_class() == expected
    assert machine_class("cuda") == machine_class("tensorrt") == (expected or "gpu")
    assert machine_class("cpu") == isa_class()


def test_machine_without_a_driver_has_no_gpu(monkeypatch):
    """Where there is no CUDA driver, there is no class either."""

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu_class() is None
