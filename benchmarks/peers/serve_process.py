"""A server with all of its processes, whoever started them: they carry a mark in their environment."""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

MARK = "EDGEWARD_BENCHMARK"
STOPS_WITHIN_S = 10.0


class Server:
    """Started at once; while it is frozen it takes no time from the others."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._mark = f"{MARK}={uuid.uuid4().hex}".encode()
        self.log = folder / "log"
        key, _, value = self._mark.decode().partition("=")
        self.started = time.perf_counter()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment | {key: value}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def ended(self) -> str | None:
        """Why, if it has."""
        if self._process.poll() is None:
            return None
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        return f"exit code {self._process.returncode}: {lines[-1][:200]}"

    def processes(self) -> list[int]:
        """The ids of those that carry the mark, and of their children, as some overwrite what they inherited."""
        parents, found = {}, {self._process.pid}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                pid, stat = int(path.name), (path / "stat").read_text().rpartition(")")[2].split()
                parents[pid] = int(stat[1]) if stat[0] != "Z" else 0
                if self._mark in (path / "environ").read_bytes().split(b"\0"):
                    found.add(pid)
        while children := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= children
        return sorted(found & {pid for pid, parent in parents.items() if parent})

    def freeze(self) -> None:
        """Until `thaw`."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on."""
        self._send(signal.SIGCONT)

    def _send(self, which: signal.Signals) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, which)

    def memory(self) -> tuple[float, float]:
        """MB, resident, of all processes: their sum, and with each shared page counted once (PSS)."""
        rss = pss = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                sizes = {line.split(":")[0]: line.split()[1] for line in rollup.splitlines()[1:]}
                rss, pss = rss + int(sizes["Rss"]), pss + int(sizes["Pss"])
        return rss * 1024 / 1e6, pss * 1024 / 1e6

    def stop(self) -> None:
        """All of them, kindly at first."""
        self.thaw()
        left = {*self.processes()}
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOPS_WITHIN_S)
        end = time.perf_counter() + STOPS_WITHIN_S
        while time.perf_counter() < end and (left := {*filter(_runs, left | {*self.processes()})}):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self._process.poll()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
