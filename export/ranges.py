"""Ranges of activations: one pass over calibration examples, whatever their number, serves every static candidate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx

from bundle import preprocess
from bundle.errors import ModelError
from bundle.manifest import Input
from bundle.session import Session
from export.placement import activations, placed

Method = Literal["minmax", "percentile"]

BINS = 2048
OUTSIDE = 1e-4  # the share of the values that "percentile" leaves out on each side
COUNTED = 8192  # values of a tensor that one example adds to its histogram; least and greatest are of all of them


@dataclass
class Histogram:
    """What is kept of a tensor's values. The edges of the bins are multiples of a power of two.

    So a wider range is had by joining bins in pairs, and nothing that was counted moves.
    """

    least: float = np.inf
    greatest: float = -np.inf
    exponent: int = -126  # a bin is 2**exponent wide
    first: int = 0  # bin i of `counts` is [first + i, first + i + 1) times the width
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))  # (BINS,)
    examples: int = 0

    @property
    def edges(self) -> np.ndarray:
        """float64 (BINS + 1,)."""
        return np.ldexp(np.arange(self.first, self.first + BINS + 1, dtype=np.float64), self.exponent)

    def add(self, values: np.ndarray) -> None:
        """Count the values of one example, float32 of any shape."""
        flat = values.ravel()
        stride = 1 + flat.size // COUNTED | 1  # odd, so that no channel of an even number is left out
        picked = flat[self.examples % stride :: stride].astype(np.float64)
        self.examples += 1
        self._widen(float(flat.min()), float(flat.max()))
        bins = np.floor(np.ldexp(picked, -self.exponent)).astype(np.int64) - self.first
        self.counts = self.counts + np.bincount(bins, minlength=BINS)

    def _widen(self, least: float, greatest: float) -> None:
        self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
        magnitude = max(-self.least, self.greatest, 0.0)
        exponent = max(self.exponent, int(np.frexp(magnitude)[1]) - 30)  # one value alone must not overflow `first`
        while np.floor(np.ldexp(self.greatest, -exponent)) - np.floor(np.ldexp(self.least, -exponent)) >= BINS:
            exponent += 1
        first = int(np.floor(np.ldexp(self.least, -exponent)))
        used = np.flatnonzero(self.counts)
        moved = ((used + self.first) >> min(exponent - self.exponent, 62)) - first
        self.counts = np.bincount(moved, self.counts[used], minlength=BINS).astype(np.int64)
        self.exponent, self.first = exponent, first


Statistics = Mapping[str, Histogram]
"""By tensor."""


def observe(prepared: bytes, spec: Input, rows: Sequence[np.ndarray]) -> Statistics:
    """Run examples, one at a time, and keep the histograms of all activations that may become int8.

    The memory it takes is that of one example and 16 KiB a tensor.

    Args:
        prepared: fp32, as quantize.prepared gives it.
        spec: of its input.
        rows: preprocessed training examples.

    Raises:
        ModelError: a value is not finite.
    """
    model = onnx.load_from_string(prepared)
    found = {name: Histogram() for name in activations(model, placed(model, spec))}
    session = Session(with_outputs(prepared, found), device="cpu")
    for row in rows:
        feeds = preprocess.collate([row], spec)
        values = feeds | session.run(feeds)
        for name, histogram in found.items():
            if not np.isfinite(values[name]).all():
                raise ModelError(f"tensor {name!r} is not finite on a calibration example; nothing can be quantized.")
            histogram.add(values[name])
    return found


def ranges(statistics: Statistics, method: Method) -> dict[str, tuple[float, float]]:
    """Least and greatest value that 8 bits are to hold, by tensor; zero is between them.

    Args:
        statistics: of one example or more.
        method: "minmax" holds every value seen, "percentile" leaves 0.01% of them out on either side.
    """
    choose = {"minmax": _minmax, "percentile": _percentile}[method]
    found = {name: choose(histogram) for name, histogram in statistics.items()}
    return {name: (min(least, 0.0), max(greatest, 0.0)) for name, (least, greatest) in found.items()}


def _minmax(histogram: Histogram) -> tuple[float, float]:
    return histogram.least, histogram.greatest


def _percentile(histogram: Histogram) -> tuple[float, float]:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    low, high = np.searchsorted(share, [OUTSIDE, 1 - OUTSIDE])
    return max(histogram.edges[low], histogram.least), min(histogram.edges[high + 1], histogram.greatest)


def with_outputs(graph: bytes, names: Iterable[str]) -> bytes:
    """The graph, which gives these tensors, too."""
    model = onnx.load_from_string(graph)
    given = {value.name for value in (*model.graph.input, *model.graph.output)}
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in names if name not in given)
    return bytes(model.SerializeToString())
