"""What a process that scores has cost so far."""

import os
import resource
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from score.units import UnitReport


def measured(reports: Iterable[UnitReport]) -> Iterator[UnitReport]:
    """The reports of the units that this process scores, each with what the process had cost by then."""
    process = process_name()
    began, began_cpu = time.perf_counter(), time.process_time()
    for report in reports:
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        yield msgspec.structs.replace(report, process=process, wall_s=wall_s, cpu_s=cpu_s, peak_rss=peak_rss())


def process_name() -> str:
    """HOST:PID of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def peak_rss(status: Path = Path("/proc/self/status")) -> int:
    """The most memory that this process has held, in bytes.

    Linux' ru_maxrss is not taken, because a new process begins with that of its parent.
    """
    try:
        lines = status.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
