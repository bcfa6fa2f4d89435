"""Scored offline in batches, or asked for one by one of a server: the same float32, byte for byte."""

import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from bundle.model import load_model
from serve.client import Client
from serve.config import ServeConfig
from serve.server import start
from tests import serve_bundles as bundles
from tests.finetune_examples import tweets
from tests.score_examples import lists, scored, write_csv

ROWS = 40


@pytest.fixture(scope="module")
def models(tmp_path_factory, image_bundle, text_bundle):
    """Tiny ones, and two that were trained: dynamic int8, whose answers depend on the batch, and static int8."""
    root = tmp_path_factory.mktemp("models")
    bundles.write_words_bundle(root / "reviews")
    bundles.write_vector_bundle(root / "flowers", tasks=(bundles.COLOUR,))
    return {"reviews": root / "reviews", "flowers": root / "flowers", "digits": image_bundle, "tweets": text_bundle}


@pytest.fixture(scope="module")
def client(models):
    server = start(ServeConfig(paths=tuple(models.values()), port=0, device="cpu", threads=1))
    with Client(server.address) as client:
        yield client
    server.stop(drain_s=0)


def write(name, folder):
    """An input of `edgeward score`, and its examples as the client takes them."""
    random = np.random.default_rng(7)
    match name:
        case "flowers":
            vectors = (random.standard_normal((ROWS, 3)) * 10.0 ** random.integers(-20, 20, (ROWS, 3))).astype("f4")
            table = {"flower": pa.FixedSizeListArray.from_arrays(vectors.ravel(), 3)}
            parquet.write_table(pa.table(table), folder / "in.parquet")
            return folder / "in.parquet", list(vectors)
        case "reviews":
            words = ("电影", "好", "难看", "film", "很", "谁知道", " ")
            texts = ["".join(random.choice(words, size)) for size in random.integers(0, 9, ROWS)]
            (folder / "in.jsonl").write_text("".join(json.dumps({"review": text}) + "\n" for text in texts))
            return folder / "in.jsonl", texts
        case "tweets":
            texts = [text for text, _ in tweets(ROWS)]
            return write_csv(folder / "in.csv", {"text": texts}), texts
        case _:
            (folder / "in").mkdir()
            paths = [folder / "in" / f"{row:02}.{'png' if row % 2 else 'jpg'}" for row in range(ROWS)]
            for path in paths:
                size = random.integers(8, 60, 2)
                Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(path)
            return folder / "in", [path.read_bytes() for path in paths]


@pytest.mark.parametrize("name", ["reviews", "flowers", "digits", "tweets"])
def test_rows_are_answered_as_the_server_answers_them_one_by_one(models, client, tmp_path, name):
    """In batches of 16, where the bundle allows them, by two threads that decode; the label, scores, logits."""
    data, examples = write(name, tmp_path)
    options = {"batch": 16, "decoders": 2, "logits": True, "scores": True}
    table = scored(models[name], data, out=tmp_path / "out", **options)

    assert load_model(models[name], device="cpu").variant.batch_invariant == (name != "tweets")
    assert len(table) == len(examples) == ROWS
    one_by_one = [client.predict(name, [example]) for example in examples]
    served = {output: np.concatenate([answer[output] for answer in one_by_one]) for output in one_by_one[0]}
    assert len(np.unique(served["logits"], axis=0)) > ROWS / 4
    assert table["label"].to_pylist() == [label.decode() for label in served["label"][:, 0]]
    for column, output in (("logits", "logits"), ("scores", "score")):
        assert lists(table, column).tobytes() == served[output].tobytes()
    assert table["score"].to_numpy().tobytes() == served["score"].max(axis=1).tobytes()
