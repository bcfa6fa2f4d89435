"""The options of `edgeward export`."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

Effort = Literal["fast", "normal", "thorough"]
Objective = Literal["latency", "throughput"]
TargetName = Literal["auto", "cpu", "cpu-avx2", "cpu-vnni", "cpu-arm64", "cuda", "tensorrt"]


@dataclass(frozen=True)
class ExportConfig:
    """Options of `edgeward export`."""

    checkpoint: Path
    """Directory that `edgeward finetune` wrote, or any ONNX model, FILE.onnx."""
    _: KW_ONLY
    out: Path
    """Bundle directory; must not exist yet."""
    data: str | None = None
    """Where the data is now, when it has moved since fine-tuning; of an ONNX model, the examples to hold it to."""
    name: str | None = None
    """Name to be served under; by default that of the directory."""
    version: int = 1
    """Version to be served as."""
    max_drop: float = 1.0
    """Largest loss of the metric against the reference, in points (1 = 0.01); of an error such as RMSE, in percent."""
    metric: str | None = None
    """What must not drop; by default accuracy, of sets of labels exact_match, of numbers rmse."""
    confidence: float = 0.95
    """Of the bound that must be within --max-drop."""
    max_latency_ms: float | None = None
    """Ship nothing that takes longer for one example on this machine, at the median."""
    max_size_mb: float | None = None
    """Ship no graph that is larger."""
    target: TargetName = "auto"
    """What it is compiled for, which must be this machine; auto says what that is."""
    effort: Effort = "normal"
    """How many ways to compile are tried; all but fast also keep single layers in fp32 where that pays."""
    optimize: Objective = "latency"
    """Fastest means: one example at a time, or rows per second in batches."""
    variant: str = "auto"
    """Ship exactly this one, or fail; "auto" ships the fastest that passes."""
    calibration: int = 200
    """Training examples that set the ranges of static int8."""
    refit_head: bool = False
    """Try static int8 with a head that is fitted to what the int8 backbone gives, too: int8-static-refit."""
    threads: int | None = None
    """The most that one run may have; by default all the cores that this process may use."""
    goldens: Path | None = None
    """Examples that travel in the bundle; by default eight of the selection split."""
    add_to: Path | None = None
    """A bundle of the same model, made on another machine: --out becomes a copy with this machine's variant added."""
    labels: Path | None = None
    """Of an ONNX model: its labels, one a line."""
    preprocess: Path | None = None
    """Of an ONNX model: how raw examples become tensors, the `input` of a bundle's manifest as a JSON file."""
    cache: bool = True
    """Take what an earlier export computed of the same things from the cache."""
    report: Path | None = None
    """Write the report here too, even when no bundle is written: FILE.json, or FILE.html with the flipped examples."""
