"""What a reload costs those who are calling meanwhile: python -m benchmarks.reload BUNDLE

A server with --watch serves version 1 of the bundle. The most that it answers is measured with several callers; then
requests come at random times, at half that rate, whether or not earlier ones have been answered, and new versions are
renamed into place. A request's latency counts from when it was due. Printed for each swap: the latencies of the calm
time before, those from 2 s before the first answer of the new version to 2 s after, and the longest of these.

Options that are not its own go to the server.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import grpc
import msgspec
import numpy as np

from bundle import preprocess
from bundle.manifest import to_json
from bundle.store import DIGEST, MANIFEST, Bundle, digest_line, open_bundle
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc

CALLERS = 8  # at the same time, when the most is measured
CAPACITY_S = 6.0  # of which the first third warms up
CALM_S, SETTLE_S = 8.0, 4.0  # before a new version is put into place, and after
WINDOW_S = 2.0
START_S = 60.0  # until the server must be ready


@dataclass(frozen=True)
class Answer:
    """One request, answered: times in seconds on one clock."""

    due: float
    done: float
    version: str


def requests_for(bundle: Bundle) -> list[pb.ModelInferRequest]:
    """One for each golden example."""
    (spec,) = preprocess.wire_inputs(bundle.manifest.input)
    if spec.datatype != "BYTES":
        raise SystemExit(f"{bundle.path} takes {spec.datatype}; give a bundle of texts or images.")
    made = []
    for golden in bundle.manifest.goldens:
        raw = bundle.read(golden.file)
        request = pb.ModelInferRequest(model_name=bundle.manifest.name)
        request.inputs.add(name=spec.name, datatype="BYTES", shape=[1, 1])
        request.raw_input_contents.append(len(raw).to_bytes(4, "little") + raw)
        made.append(request)
    return made


def write_version(bundle: Bundle, repository: Path, version: int) -> Path:
    """The bundle under another version, beside the place where the server looks for it."""
    beside = repository / f".{version}"
    shutil.copytree(bundle.path, beside)
    manifest = to_json(msgspec.structs.replace(bundle.manifest, version=version))
    (beside / MANIFEST).write_bytes(manifest)
    (beside / DIGEST).write_bytes(digest_line(MANIFEST, manifest))
    return beside


@contextmanager
def server(repository: Path, options: Sequence[str]) -> Iterator[str]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "edgeward", "serve", str(repository), "--port", "0", "--watch", *options]
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            yield _address(process, Path(output.name))
        finally:
            process.terminate()
            process.wait(START_S)


def _address(process: subprocess.Popen[bytes], output: Path) -> str:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and process.poll() is None:
        ready = [line for line in output.read_text().splitlines() if re.search(r"\bready\b", line)]
        found = re.search(r"address\W+([\w.]+:\d+)", ready[0]) if ready else None
        if found:
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{output.read_text()}")


class Caller:
    """Sends requests in turn and keeps what came of them."""

    def __init__(self, address: str, requests: Sequence[pb.ModelInferRequest]) -> None:
        self._stub = rpc.GRPCInferenceServiceStub(grpc.insecure_channel(address))  # type: ignore[no-untyped-call]
        self._requests = requests
        self._sent = 0
        self.answers: list[Answer] = []
        self.errors: list[str] = []
        self.open = threading.Semaphore(0)  # released by every answer

    def send(self, due: float) -> None:
        """Send the next request and do not wait for its answer."""
        request = self._requests[self._sent % len(self._requests)]
        self._sent += 1
        self._stub.ModelInfer.future(request, timeout=START_S).add_done_callback(lambda call: self._keep(due, call))

    def _keep(self, due: float, call: grpc.Future) -> None:
        done = time.perf_counter()
        try:
            self.answers.append(Answer(due, done, call.result().model_version))
        except grpc.RpcError as error:
            self.errors.append(str(error))
        self.open.release()

    def measure_capacity(self) -> float:
        """Answers a second, with CALLERS requests always under way."""
        start = time.perf_counter()
        for _ in range(CALLERS):
            self.send(start)
        while (now := time.perf_counter()) < start + CAPACITY_S:
            self.open.acquire()
            self.send(now)
        for _ in range(CALLERS):
            self.open.acquire()
        first = start + CAPACITY_S / 3
        return sum(first <= answer.done < start + CAPACITY_S for answer in self.answers) / (CAPACITY_S * 2 / 3)

    def send_at_random(self, rate: float, seconds: float, seed: int) -> None:
        """A Poisson process of requests, and wait for the last answer."""
        random_ = random.Random(seed)
        due = start = time.perf_counter()
        sent = 0
        while (due := due + random_.expovariate(rate)) < start + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            self.send(due)
            sent += 1
        for _ in range(sent):
            self.open.acquire()


def put_into_place(versions: Sequence[Path]) -> list[float]:
    """Rename each version into place when its time has come; when that was."""
    renamed = []
    for beside in versions:
        time.sleep(CALM_S)
        beside.rename(beside.with_name(beside.name[1:]))
        renamed.append(time.perf_counter())
        time.sleep(SETTLE_S)
    return renamed


def run(bundle: Bundle, swaps: int, seed: int, options: Sequence[str]) -> tuple[float, list[float], list[Answer]]:
    """Capacity in answers a second, when versions were renamed into place, and the answers at half the capacity."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        (repository / bundle.manifest.name).mkdir()
        beside = [write_version(bundle, repository / bundle.manifest.name, n + 1) for n in range(swaps + 1)]
        beside[0].rename(beside[0].with_name("1"))
        with server(repository, options) as address:
            caller = Caller(address, requests_for(bundle))
            capacity = caller.measure_capacity()
            caller.answers = []
            renamed: list[float] = []
            swapper = threading.Thread(target=lambda: renamed.extend(put_into_place(beside[1:])))
            swapper.start()
            caller.send_at_random(capacity / 2, swaps * (CALM_S + SETTLE_S), seed)
            swapper.join()
    if caller.errors:
        raise SystemExit(f"{len(caller.errors)} requests failed, the first with:\n{caller.errors[0]}")
    return capacity, renamed, sorted(caller.answers, key=lambda answer: answer.due)


def milliseconds(answers: Sequence[Answer], start: float, end: float) -> np.ndarray:
    """Latencies of the requests that were due in a time."""
    return np.array([answer.done - answer.due for answer in answers if start <= answer.due < end]) * 1e3


def report(capacity: float, renamed: Sequence[float], answers: Sequence[Answer]) -> None:
    """Print a line for each swap, and the medians."""
    print(f"{capacity:.0f} answers a second; open loop at {capacity / 2:.0f}, no request failed")
    ratios, longest = [], []
    starts = [renamed[0] - CALM_S + 1, *(moment + SETTLE_S for moment in renamed)]
    for i, (start, moment) in enumerate(zip(starts[:-1], renamed, strict=True)):
        swapped = next((each.done for each in answers if each.version == str(i + 2)), None)
        if swapped is None:
            raise SystemExit(f"version {i + 2} never answered.")
        calm = milliseconds(answers, start, moment)
        window = milliseconds(answers, swapped - WINDOW_S, swapped + WINDOW_S)
        (p50, p99), p99_swap = np.percentile(calm, [50, 99]), np.percentile(window, 99)
        ratios.append(p99_swap / p99)
        longest.append(window.max())
        print(
            f"version {i + 2}: answers {swapped - moment:.2f} s after its rename; before p50 {p50:.1f} ms, p99 "
            f"{p99:.1f} ms; around the swap p99 {p99_swap:.1f} ms, ratio {ratios[-1]:.2f}, longest {longest[-1]:.1f} ms"
        )
    backwards = sum(int(b.version) < int(a.version) for a, b in pairwise(sorted(answers, key=lambda each: each.done)))
    print(f"ratio of the p99s: median {np.median(ratios):.2f}, largest {max(ratios):.2f}")
    print(f"longest wait {max(longest):.1f} ms")
    print(f"answers of an older version after one of a newer: {backwards}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="of texts or images")
    parser.add_argument("--swaps", type=int, default=5, help="new versions, 12 s each (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    options, for_server = parser.parse_known_args()
    sys.setswitchinterval(0.0005)  # the client's own threads
    report(*run(open_bundle(options.bundle), options.swaps, options.seed, for_server))


if __name__ == "__main__":
    main()
