"""Tiny networks of every kind, their inputs and their tasks, for the tests of export."""

import numpy as np
import torch
from torch import nn

from bundle import vector
from bundle.manifest import (
    ImageInput,
    Multiclass,
    Multilabel,
    Regression,
    TextInput,
    VectorInput,
    WordsInput,
)
from export import timing
from finetune import evaluate
from finetune.checkpoint import FORMAT, FORMAT_VERSION, CheckpointSpec, Provenance, write_checkpoint
from finetune.data import load_dataset
from finetune.model import (
    ImageNetwork,
    MlpModel,
    Standardize,
    TextNetwork,
    VectorNetwork,
    WordsNetwork,
    WordVectors,
    dense,
)
from finetune.probe import fit_head
from finetune.splits import make_splits

TASKS = (
    Multiclass(name="kind", labels=("a", "b", "c")),
    Multilabel(name="tags", labels=("x", "y")),
    Regression(name="size", mean=3.0, std=2.0),
)
KINDS = ("text", "pair", "image", "words", "vector")
SIZE = 6  # of a vector


def clock(*ratios, ms=1.0):
    """A timer that gives these latency ratios in turn, and so many milliseconds to the reference.

    Runs of several examples take as long as the reference's.
    """
    remaining = list(ratios)

    def timer(candidate, reference, feeds):
        alone = all(len(array) == 1 for array in feeds[0].values())
        ratio = remaining.pop(0) if alone else 1.0
        return timing.Timing(p50_ms=ratio * ms, reference_p50_ms=ms, ratio=ratio, ratio_lower=ratio, ratio_upper=ratio)

    return timer


class Encoder(nn.Module):
    """Token embeddings and a layer, with the interface of a transformers encoder."""

    class config:
        type_vocab_size = 2

    def __init__(self):
        super().__init__()
        self.embedding, self.types, self.layer = nn.Embedding(50, 16), nn.Embedding(2, 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        hidden = self.embedding(input_ids)
        if token_type_ids is not None:
            hidden = hidden + self.types(token_type_ids)

        class Output:
            last_hidden_state = torch.tanh(self.layer(hidden))

        return Output()


def tiny(kind, tasks=TASKS, count=40):
    """An untrained network of a kind, its input, and preprocessed random examples of mixed length."""
    random = np.random.default_rng(0)
    columns = sum(len(getattr(task, "labels", "1")) for task in tasks)
    lengths = [1, 1, *random.integers(1, 12, count - 2)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match kind:
            case "text":
                spec = TextInput(column="text", max_length=16, pad_id=0, buckets=(8, 16))
                rows = [random.integers(1, 50, n) for n in lengths]
                network = TextNetwork(Encoder(), 16, columns, 0.1, "mean")
            case "pair":
                spec = TextInput(column="first", pair="second", max_length=16, pad_id=0, buckets=(8, 16))
                rows = [np.stack([random.integers(1, 50, n), random.integers(0, 2, n)]) for n in lengths]
                network = TextNetwork(Encoder(), 16, columns, 0.1, "mean")
            case "image":
                normal = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
                spec = ImageInput(column="image", height=8, width=8, resize=8, interpolation="bilinear", **normal)
                rows = list(random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
                layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
                network = ImageNetwork(nn.Sequential(*layers), 32, columns, spec)
            case "words":
                spec = WordsInput(column="text", segmenter="whitespace", lowercase=True, max_words=16, buckets=(8, 16))
                rows = [random.integers(0, 50, n - 1) for n in lengths]
                network = WordsNetwork(
                    WordVectors(torch.randn(50, 16), "mean", (8,), Standardize(np.zeros(16), np.ones(16))),
                    8,
                    columns,
                    0.0,
                )
            case "vector":
                spec = VectorInput(column="features", size=SIZE)
                rows = list(random.normal(size=(count, SIZE)).astype(np.float32))
                network = VectorNetwork(mlp((8,)), 8, columns, 0.0)
    return network.eval(), spec, rows


def mlp(widths):
    return nn.Sequential(Standardize(np.zeros(SIZE), np.ones(SIZE)), *dense(SIZE, widths))


def write_table(path, missing, count=800):
    """A CSV of six numbers and what follows from them: a kind, tags, and a size, a share of each not known."""
    random = np.random.default_rng(1)
    x = random.normal(size=(count, SIZE)).round(4)
    noisy = x + random.normal(size=x.shape) * 0.3
    kinds = np.array(["a", "b", "c"])[noisy[:, :3].argmax(axis=1)]
    tags = ["|".join(name for name, on in zip("xy", row, strict=True) if on) for row in noisy[:, 3:5] > 0]
    sizes = 100 + 10 * noisy[:, 5]
    lost = random.random((count, 3)) < missing
    lost[lost.all(axis=1)] = False
    lines = [",".join([*(f"f{i}" for i in range(SIZE)), "kind", "tags", "size"])]
    for i in range(count):
        labels = [kinds[i], tags[i] or "|", f"{sizes[i]:.3f}"]
        cells = ["" if gone else label for gone, label in zip(lost[i], labels, strict=True)]
        lines.append(",".join([*(f"{value}" for value in x[i]), *cells]))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_mlp(folder, label_column, widths=(16,), split=(0.4, 0.1, 0.2, 0.3)):
    """A checkpoint of random dense layers with a fitted head, on the table."""
    data = write_table(folder / "table.csv", 0.1 if len(label_column) > 1 else 0)
    features = tuple(f"f{i}" for i in range(SIZE))
    dataset = load_dataset(data, "vector", input_column=features, label_column=label_column)
    splits = make_splits(dataset, split, seed=0)
    train, validation = (splits.indices(dataset, name) for name in ("train", "validation"))
    tasks = tuple(target.task(train) for target in dataset.targets)
    spec = VectorInput(column="features", size=SIZE, names=dataset.feature_names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = (SIZE, *widths)[-1]
        network = VectorNetwork(mlp(widths), width, sum(target.width for target in dataset.targets), 0.0).eval()

    def rows(indices):
        return [vector.decode(dataset.raw(int(i)), spec) for i in indices]

    def targets(indices):
        return tuple(target.take(indices) for target in dataset.targets)

    seen, held_out = (evaluate.features(network, rows(part), spec) for part in (train, validation))
    head = fit_head(seen, targets(train), held_out, targets(validation), tasks)
    network.head.load_state_dict({"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)})
    provenance = Provenance(
        created="2026-01-01T00:00:00+00:00",
        config={"max_bad": 0},
        seed=0,
        data=dataset.location,
        data_sha256=dataset.sha256,
        device="cpu",
        versions={},
        examples={},
        metrics={},
        history=(),
    )
    described = CheckpointSpec(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        model=MlpModel(size=SIZE, widths=widths),
        input=spec,
        tasks=tasks,
        provenance=provenance,
        files={},
    )
    write_checkpoint(folder / "checkpoint", described, network, splits, {})
    return folder / "checkpoint"
