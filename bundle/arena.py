"""Memory that the runtime keeps on the CPU for the next run, and that no run has needed for long, is given back."""

from collections.abc import Mapping, Sequence

import numpy as np

from bundle.cuda import Run
from bundle.runtime import onnxruntime

RUNS = 64  # of a session, in which no input was large: what is kept then is kept for nothing
LARGE = 4  # times the largest of these: inputs for which more was needed

_SHRINK = "memory.enable_memory_arena_shrinkage"


class HighWater:
    """How large the inputs were that the runtime keeps memory for, and how large those of the last runs were.

    What a run needs is not known, but it grows with its inputs. Made for one thread at a time, harmless with more.
    """

    def __init__(self) -> None:
        self._kept = self._largest = 0  # bytes of inputs: since memory was given back; of the runs that are counted
        self._runs = 0

    def ebbs(self, size: int) -> bool:
        """Take a run into account, and say whether what is kept is to be given back with it.

        Args:
            size: bytes of its inputs.
        """
        if size > self._largest:
            self._largest = size
        self._runs += 1
        if self._runs < RUNS:
            return False
        ebbs = self._largest * LARGE < self._kept
        if ebbs or self._largest > self._kept:
            self._kept = self._largest
        self._runs = self._largest = 0
        return ebbs


def run_of(session: onnxruntime.InferenceSession) -> Run:
    """Its own `run`, which gives memory back when that is time: a run that comes later takes it anew.

    What the first run took is kept, as the runtime does: let it be a small one.
    """
    shrinking = onnxruntime.RunOptions()
    shrinking.add_run_config_entry(_SHRINK, "cpu:0")
    water = HighWater()

    def run(names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        size = 0
        for array in feeds.values():
            size += array.nbytes
        values: Sequence[np.ndarray] = session.run(names, feeds, shrinking if water.ebbs(size) else None)
        return values

    return run
