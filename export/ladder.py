"""The candidates: ways to compile the fp32 graph, from what helps most often to what helps rarely."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import onnx

from bundle import preprocess
from bundle.errors import ModelError
from bundle.manifest import ImageInput, Input
from export import half, quantize, ranges
from export.config import Effort
from export.embeddings import quantized_embeddings
from export.ranges import Method, Statistics
from export.source import Source

Kind = Literal["fp32", "fp16", "dynamic", "static", "refit"]
Device = Literal["cpu", "cuda", "tensorrt"]


@dataclass(frozen=True)
class Recipe:
    """How a candidate is made of the fp32 graph."""

    kind: Kind
    method: Method = "minmax"  # of the ranges of static int8
    per_channel: bool = True
    corrected: bool = False  # scales and biases, for what int8 moves in each channel
    kept: tuple[str, ...] = ()  # nodes that stay in fp32

    @property
    def name(self) -> str:
        """As it is called in reports, manifests and by --variant."""
        match self.kind:
            case "fp32" | "fp16":
                return self.kind
            case "dynamic":
                parts = ["int8", "dynamic"] if self.per_channel else ["int8", "dynamic", "tensor"]
            case "refit":
                parts = ["int8", "static", "refit"]
            case "static":
                parts = ["int8", "mixed" if self.kept else "static"]
                parts += [] if self.per_channel else ["tensor"]
                parts += [] if self.method == "minmax" else [self.method]
                parts += ["corrected"] if self.corrected else []
        return "-".join(parts)

    @property
    def words(self) -> str:
        """How it is made, a clause."""
        match self.kind:
            case "fp32":
                return "as it was trained, fused"
            case "fp16":
                return "half precision, but for what would overflow"
            case "dynamic":
                return f"weights in int8 per {self._weights}, activations scaled at every run"
            case "refit":
                return "the backbone in static int8, the head fitted to it in fp32"
            case "static":
                bias = ", scales and biases corrected" if self.corrected else ""
                kept = f", {len(self.kept)} nodes in fp32" if self.kept else ""
                return (
                    f"weights in int8 per {self._weights}, activations in uint8 with {self.method} ranges{bias}{kept}"
                )

    @property
    def _weights(self) -> str:
        return "channel" if self.per_channel else "tensor"

    @property
    def kernels(self) -> tuple[str, bool, tuple[str, ...]]:
        """What decides how fast it is: two recipes with the same run the same kernels on other numbers."""
        return ("static" if self.kind == "refit" else self.kind, self.per_channel, self.kept)


FP32, FP16, DYNAMIC, STATIC, REFIT = (Recipe(kind) for kind in ("fp32", "fp16", "dynamic", "static", "refit"))
CORRECTED, PERCENTILE = replace(STATIC, corrected=True), replace(STATIC, method="percentile")
PER_TENSOR, DYNAMIC_PER_TENSOR = (replace(recipe, per_channel=False) for recipe in (STATIC, DYNAMIC))


def ladder(spec: Input, effort: Effort, device: Device) -> tuple[Recipe, ...]:
    """What is tried after fp32, in the order in which it is tried: docs/export.md, Which quantization helps.

    CUDA has no kernels for int8, and would copy every tensor to the CPU and back; x86 has none for fp16. Dynamic int8
    is for matrix products: of an image's convolutions it would leave all in fp32.
    """
    if device == "cuda":
        return (FP16,)
    if device == "tensorrt":
        return (FP16, STATIC)
    tried = [STATIC, CORRECTED] if isinstance(spec, ImageInput) else [DYNAMIC, STATIC]
    if effort != "fast" and isinstance(spec, ImageInput):
        tried += [PER_TENSOR]
    if effort == "thorough":
        tried += [PERCENTILE] if isinstance(spec, ImageInput) else [PERCENTILE, PER_TENSOR, DYNAMIC_PER_TENSOR]
    return tuple(tried)


def recipe_named(name: str, spec: Input, device: Device) -> Recipe:
    """The recipe that --variant asks for.

    Raises:
        ModelError: there is none of this name.
    """
    always = (FP32, DYNAMIC, REFIT) if device == "cpu" else (FP32,)
    known: dict[str, Recipe] = {recipe.name: recipe for recipe in (*always, *ladder(spec, "thorough", device))}
    if name not in known:
        raise ModelError(f"there is no variant {name!r}. Choose one of: auto, {', '.join(known)}.")
    return known[name]


class Compiler:
    """Makes candidates; what several of them need is computed once, and only when it is needed."""

    def __init__(self, source: Source, *, signed: bool, qdq: bool = False) -> None:
        """Compute nothing yet.

        Args:
            source: what they are made of.
            signed: whether activations become int8, as suits ARM, or uint8, as suits x86.
            qdq: whether static int8 is QDQ for all inputs, as suits TensorRT.
        """
        self._source, self._signed, self._qdq = source, signed, qdq

    @cached_property
    def prepared(self) -> bytes:
        """The fp32 graph that static int8 starts from."""
        return self._source.memory.blob("prepared", compute=lambda: quantize.prepared(self._source.graph))

    @cached_property
    def packed(self) -> bytes:
        """The same with its first convolution as this machine's int8 kernels want it."""
        if not quantize.suits(signed=self._signed):
            return self.prepared
        return self._source.memory.blob("packed", compute=lambda: quantize.prepared(self._source.graph, packed=True))

    @cached_property
    def statistics(self) -> Statistics:
        """What the calibration examples showed."""
        return ranges.observe(self.packed, self._source.spec, self._source.calibration)

    @cached_property
    def _stem(self) -> str | None:
        return quantize.stem(onnx.load_from_string(self.prepared))

    def compile(self, recipe: Recipe, *, keep: bool = True) -> bytes:
        """The graph of a recipe.

        Args:
            recipe: what to make.
            keep: remember it for the next export.

        Raises:
            ModelError: it cannot be quantized in this way.
        """
        if not keep:
            return self._make(recipe)
        return self._source.memory.blob(recipe, self._signed, compute=lambda: self._make(recipe))

    def _make(self, recipe: Recipe) -> bytes:
        source = self._source
        match recipe.kind:
            case "fp32":
                return source.graph
            case "fp16":
                feeds = [preprocess.collate([row], source.spec) for row in source.sample]
                return half.fp16(source.graph, feeds)
            case "dynamic":
                compiled = quantize.int8_dynamic(source.graph, per_channel=recipe.per_channel)
                return quantized_embeddings(compiled)
            case "refit":
                if source.refit is None:
                    raise ModelError("only the head of a checkpoint can be fitted again, not that of an ONNX model.")
                return source.refit()
            case "static":
                start = self.prepared if self._stem in recipe.kept else self.packed
                compiled = quantize.int8_static(
                    start,
                    source.spec,
                    ranges.ranges(self.statistics, recipe.method),
                    per_channel=recipe.per_channel,
                    signed=self._signed,
                    kept=recipe.kept,
                    qdq=self._qdq,
                )
                if recipe.corrected:
                    compiled = quantize.corrected(compiled, start, source.spec, source.calibration)
                return quantized_embeddings(compiled)
