import io
import json

import numpy as np
import pytest
from PIL import Image

from bundle import image, preprocess, vector
from bundle.errors import DataError
from bundle.manifest import ImageInput, NamedTensor, TensorsInput, TextInput, VectorInput, WordsInput
from export.examples import MOST, read_examples
from tests.golden import make_format_1, make_format_2

NORMAL = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGE = ImageInput(column="file", height=8, width=8, resize=8, interpolation="bilinear", **NORMAL)
TEXT = TextInput(column="review", max_length=8, pad_id=0, buckets=(8,), max_bytes=40)
PAIR = TextInput(column="claim", pair="source", max_length=8, pad_id=0, buckets=(8,))
WORDS = WordsInput(column="review", segmenter="whitespace", lowercase=True, max_words=4, buckets=(4,))
NAMED = VectorInput(column="row", size=2, names=("width", "height"))
POINT = VectorInput(column="point", size=2)
TENSORS = TensorsInput(
    tensors=(
        NamedTensor(name="grid", datatype="FP32", shape=(2, 3)),
        NamedTensor(name="count", datatype="INT64", shape=()),
    )
)


def read(path, spec):
    tokenizer = make_format_2.tokenizer() if spec is PAIR else make_format_1.tokenizer()
    files = {"tokenizer.json": tokenizer, "vocabulary.txt": b"good\nbad\n"}
    return read_examples(path, spec, preprocess.encoder(spec, files.__getitem__))


def png(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("spec", [TEXT, WORDS], ids=["text", "words"])
def test_texts_come_from_their_column_without_labels(tmp_path, spec):
    """The column is the one that the model was trained on; what else is in the table is left alone."""
    (tmp_path / "chosen.csv").write_text('id,review\n1,good film\n2,"bad, böse"\n')

    assert read(tmp_path / "chosen.csv", spec) == [b"good film", "bad, böse".encode()]


def test_pairs_come_from_both_columns(tmp_path):
    """Two texts of a row are one example."""
    file = write_lines(tmp_path / "chosen.jsonl", {"claim": "good", "source": "film"}, {"claim": "bad", "source": ""})

    assert [json.loads(raw) for raw in read(file, PAIR)] == [["good", "film"], ["bad", ""]]


def test_images_come_from_a_folder_or_from_paths(tmp_path):
    """A folder is searched to the bottom, other files in it are passed over; a table's paths are relative to it."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "deep" / "b.PNG").write_bytes(png(2))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "chosen.csv").write_text("file\ndeep/b.PNG\n")

    assert read(tmp_path, IMAGE) == [png(1), png(2)]
    assert read(tmp_path / "chosen.csv", IMAGE) == [png(2)]
    assert image.preprocess(png(1), IMAGE).shape == (8, 8, 3)


def test_vectors_come_from_an_array_or_from_their_columns(tmp_path):
    """Both give the numbers as float32."""
    rows = np.array([[1, 2], [3, 0.5]])
    np.savez(tmp_path / "chosen.npz", x=rows)
    (tmp_path / "chosen.csv").write_text("height,label,width\n2,a,1\n0.5,b,3\n")

    expected = [vector.encode(row) for row in rows]
    assert read(tmp_path / "chosen.npz", POINT) == expected
    assert read(tmp_path / "chosen.csv", NAMED) == expected


def test_tensors_come_from_the_arrays_of_their_names(tmp_path):
    """One row of each array is an example; arrays that the model does not take are left alone."""
    grid = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    np.savez(tmp_path / "chosen.npz", count=np.array([7, 8]), grid=grid, y=np.zeros(2))

    assert read(tmp_path / "chosen.npz", TENSORS) == [
        grid[row].tobytes() + np.int64(7 + row).tobytes() for row in range(2)
    ]


@pytest.mark.parametrize(
    ("spec", "name", "content", "message"),
    [
        (TEXT, "chosen.csv", "review\n" + "good\n" * (MOST + 1), "holds 65 examples; 1 to 64 travel"),
        (TEXT, "chosen.csv", "review\n", "holds no example"),
        (TEXT, "chosen.csv", "text\ngood\n", "no column 'review'"),
        (TEXT, "chosen.csv", "review\ngood\n" + "x" * 41 + "\n", "example 2 of .* cannot be a golden example"),
        (TEXT, "chosen.csv", "id,review\n1,good\n2,bad,film\n", "rows that cannot be read: row 2"),
        (TEXT, "chosen.jsonl", '{"review": "good"}\n{"review": null}\n', "no 'review' in example 2"),
        (TEXT, "chosen.txt", "good\n", "not a table"),
        (IMAGE, "chosen.csv", "file\nnowhere.png\n", r"nowhere\.png cannot be read"),
        (POINT, "chosen.csv", "width,height\n1,2\n", "no names to find them by"),
        (NAMED, "chosen.csv", "width,height\n1,oops\n", "example 1 of .* is not finite"),
    ],
)
def test_what_cannot_be_golden_is_refused(tmp_path, spec, name, content, message):
    """Before anything is compiled, one error says which example is wrong, and why."""
    (tmp_path / name).write_text(content)

    with pytest.raises(DataError, match=message):
        read(tmp_path / name, spec)


@pytest.mark.parametrize(
    ("spec", "arrays", "message"),
    [
        (POINT, {"x": np.ones((2, 3))}, r"float64 \[2, 3\]; the model takes 2 numbers"),
        (POINT, {"y": np.ones((2, 2))}, "no array 'x'"),
        (TENSORS, {"grid": np.ones((2, 2, 3)), "count": np.ones(2, np.int64)}, "array 'grid' of .* is float64"),
        (TENSORS, {"grid": np.ones((2, 3), np.float32), "count": np.ones(2, np.int64)}, r"takes float32 .*2, 3"),
        (TENSORS, {"grid": np.ones((1, 2, 3), np.float32), "count": np.ones(2, np.int64)}, "differing lengths"),
    ],
)
def test_other_arrays_are_refused(tmp_path, spec, arrays, message):
    """Arrays are of the model's names, types and shapes, and as long as each other."""
    np.savez(tmp_path / "chosen.npz", **arrays)

    with pytest.raises(DataError, match=message):
        read(tmp_path / "chosen.npz", spec)


@pytest.mark.parametrize(
    "spec", [TEXT, IMAGE, POINT, NAMED, TENSORS], ids=["text", "image", "point", "named", "tensors"]
)
def test_file_that_is_not_there_is_refused(tmp_path, spec):
    """A path that is wrong is one clear error."""
    suffix = "npz" if spec in (POINT, TENSORS) else "csv"

    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / f"nothing.{suffix}", spec)
