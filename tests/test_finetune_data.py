"""Texts and images: where they come from, and every reason to refuse them."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bundle.errors import DataError
from bundle.log import captured
from finetune.data import load_dataset
from tests.finetune_examples import tweets, write_csv, write_digits

HEADER = ["text", "label"]


def test_one_table_is_the_same_data_in_every_format(tmp_path):
    """CSV, JSONL and Parquet of the same rows give the same examples, labels and digests."""
    rows = tweets(50)
    write_csv(tmp_path / "a.csv", [HEADER, *rows])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"label": y, "text": x}) + "\n" for x, y in rows))
    columns = {"id": list(range(50)), "text": [x for x, _ in rows], "label": [y for _, y in rows]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")

    csv, jsonl, parquet = (load_dataset(tmp_path / f"a.{s}", "text") for s in ("csv", "jsonl", "parquet"))

    assert [csv.raw(i).decode() for i in range(len(csv))] == [x for x, _ in rows]
    (target,) = csv.targets
    assert (target.name, target.kind, csv.weights) == ("label", "multiclass", (1.0,))
    assert (csv.input_columns, csv.label_columns) == (("text",), ("label",))
    assert [target.labels[i] for i in target.values] == [y for _, y in rows]
    assert target.values.dtype == np.int64
    assert target.labels == tuple(sorted({y for _, y in rows}))
    for other in (jsonl, parquet):
        assert (other.sha256, other.hashes) == (csv.sha256, csv.hashes)
        np.testing.assert_array_equal(other.targets[0].values, target.values)


def test_labels_of_any_type_are_their_words(tmp_path):
    """Numbers and truth values as labels, and texts that look like dates, are what they look like in every format."""
    texts = ["2020-01-01", "2020-01-02", "3", "4"]
    for labels, words in [([1, 0, 1, 0], ("0", "1")), ([True, False, True, False], ("false", "true"))]:
        rows = [json.dumps({"text": t, "label": y}) + "\n" for t, y in zip(texts, labels, strict=True)]
        (tmp_path / "a.jsonl").write_text("".join(rows))
        pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / "a.parquet")
        for name in ("a.jsonl", "a.parquet"):
            dataset = load_dataset(tmp_path / name, "text")
            assert dataset.targets[0].labels == words
            assert [dataset.raw(i).decode() for i in range(4)] == texts


def test_space_around_a_label_is_no_part_of_it(tmp_path):
    """Else "a" and "a " were two classes, which nobody sees."""
    labels = ["a", "a ", " b", "b"]
    path = write_csv(tmp_path / "a.csv", [HEADER, *([f"text {i}", label] for i, label in enumerate(labels))])

    target = load_dataset(path, "text").targets[0]

    assert target.labels == ("a", "b")
    assert target.values.tolist() == [0, 0, 1, 1]


def test_csv_keeps_what_is_quoted(tmp_path):
    """Commas, quotes, line breaks, a byte order mark and words like NA in a text are part of it."""
    texts = ["a, b", 'say "no"', "two\nlines", "NA", "null", "123", "4.5", "né 中文"]
    path = write_csv(tmp_path / "a.csv", [HEADER, *([t, str(i % 2)] for i, t in enumerate(texts))])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    dataset = load_dataset(path, "text")

    assert [dataset.raw(i).decode() for i in range(len(dataset))] == texts
    assert dataset.targets[0].labels == ("0", "1")


def test_csv_cell_may_be_long(tmp_path):
    """Longer than the blocks that Arrow reads by itself."""
    texts = [f"{i} " + "long " * 500_000 if i % 2 else f"{i} short" for i in range(4)]
    path = write_csv(tmp_path / "a.csv", [["text", "label"], *([text, i // 2] for i, text in enumerate(texts))])

    dataset = load_dataset(path, "text")

    assert [dataset.raw(i).decode() for i in range(4)] == texts


def test_folder_is_its_class_folders(tmp_path):
    """Images are found at any depth, by any case of the suffix; other files are told of, hidden ones are not."""
    write_digits(tmp_path, 60)
    (tmp_path / "0" / "deep").mkdir()
    moved = sorted((tmp_path / "0").glob("*.png"))[0].rename(tmp_path / "0" / "deep" / "X.PNG")
    (tmp_path / "0" / "photo.webp").write_text("not an image")
    (tmp_path / "0" / ".hidden.png").write_text("not an image")
    (tmp_path / ".cache").mkdir()

    with captured() as logs:
        dataset = load_dataset(tmp_path, "image")

    assert [(each["count"], each["first"]) for each in logs if "left out" in each["event"]] == [(1, "0/photo.webp")]
    assert len(dataset) == 60
    assert (dataset.input_columns, dataset.label_columns, dataset.held_out) == ((), (), None)
    assert dataset.targets[0].labels == tuple("0123456789")
    assert dataset.raw(dataset.names.index("0/deep/X.PNG")) == moved.read_bytes()


def test_folders_of_splits_are_no_classes(tmp_path):
    """Else the model would learn to tell the training's images from the validation's."""
    for split in ("train", "Val"):
        write_digits(tmp_path / "splits" / split, 20)

    with pytest.raises(DataError, match=r"splits holds Val, train: splits, as it seems.* Give one of them"):
        load_dataset(tmp_path / "splits", "image")
    assert len(load_dataset(tmp_path / "splits" / "train", "image")) == 20


def test_table_may_hold_image_paths(tmp_path):
    """A table's image column names files relative to the table's folder, and gives the folder's examples."""
    folder = load_dataset(write_digits(tmp_path / "digits", 40), "image")
    rows = [[f"digits/{name}", name.split("/")[0]] for name in folder.names]
    table = load_dataset(write_csv(tmp_path / "a.csv", [["file", "digit"], *rows]), "image", input_column=("file",),
                         label_column=("digit",))  # fmt: skip

    assert table.sha256 == folder.sha256
    assert table.raw(0) == folder.raw(0)


def test_digest_is_of_the_content_not_of_the_order(tmp_path):
    """Shuffled rows have the same digest; another label or another text has another."""
    rows = tweets(40)
    same = load_dataset(write_csv(tmp_path / "a.csv", [HEADER, *rows]), "text").sha256

    assert load_dataset(write_csv(tmp_path / "b.csv", [HEADER, *rows[::-1]]), "text").sha256 == same
    other = next(label for _, label in rows if label != rows[0][1])
    changed = [(rows[0][0], other), *rows[1:]]
    assert load_dataset(write_csv(tmp_path / "c.csv", [HEADER, *changed]), "text").sha256 != same
    assert load_dataset(write_csv(tmp_path / "d.csv", [HEADER, ("new", rows[0][1]), *rows[1:]]), "text").sha256 != same


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no column 'text'"),
        ([["body", "label"], ["a", "x"]], "no column 'text'; its columns are body, label"),
        ([["text", "class"], ["a", "x"]], "no column 'label'; its columns are text, class"),
        ([HEADER], "has no examples"),
        ([HEADER, ["a", "x"], ["b", "x"]], "has one label, 'x'"),
        ([HEADER, ["a", "x"], ["b", "x"], ["c", "y"]], "fewer than 2 different examples, 'y' the first"),
        ([HEADER, ["a", "x"], ["b", "x"], ["c", "y"], ["c", "y"]], "fewer than 2 different examples, 'y'"),
        ([HEADER, ["a", "x"], [" ", "x"], ["c", ""]], "2 bad of 3 examples.*row 2 has no text"),
        ([HEADER, ["a", "x"], ["b", ""]], "row 2 has no label"),
        ([HEADER, ["a", "x"], ["b", "x", "surplus"]], "1 bad of 2 .* row 2 has 3 columns instead of 2"),
        ([["text", "label", "text"], ["a", "x", "b"]], "2 columns with the name 'text'"),
    ],
)
def test_unusable_table_is_refused_by_name(tmp_path, rows, message):
    """Each thing that can be wrong with a table is one error that says which."""
    with pytest.raises(DataError, match=message):
        load_dataset(write_csv(tmp_path / "a.csv", rows), "text")


def test_other_encoding_is_refused_with_its_place(tmp_path):
    """A CSV that is not UTF-8 is refused with the offset of the first wrong byte."""
    (tmp_path / "a.csv").write_bytes("text,label\ncafé,x\n".encode("latin-1"))

    with pytest.raises(DataError, match=r"not UTF-8: .* at byte 14"):
        load_dataset(tmp_path / "a.csv", "text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": ', "1 bad of 2 .* line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a", "label": "x"}\n[1, 2]\n', "line 2 is not a JSON object"),
        ("a.jsonl", b"", r"no column 'text'; its columns are \(none\)"),
        ("a.jsonl", b'{"text": ["a"], "label": "x"}\n', "'text' in line 1 of .* is a list, not text"),
        ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "\\ud800"}', "line 2 is not Unicode: it has half of a"),
        ("a.parquet", b"PAR1 not really", "cannot be read"),
        ("a.xlsx", b"", "is not a table: its suffix"),
    ],
)
def test_broken_file_is_refused(tmp_path, name, content, message):
    """A file that is not what its suffix says is one clear error."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path / name, "text")


def test_places_without_data_are_refused(tmp_path):
    """Nothing there, a folder for texts, an empty folder and an empty class folder each say so."""
    with pytest.raises(DataError, match="no dataset at"):
        load_dataset(tmp_path / "nowhere", "text")
    with pytest.raises(DataError, match=r"Give a folder, a table, an .npz file, or torchvision:CIFAR10"):
        load_dataset(tmp_path / "nowhere", "image")
    with pytest.raises(DataError, match=r"no dataset torchvision:MNIST; the one .* is torchvision:CIFAR10"):
        load_dataset("torchvision:MNIST", "image")
    with pytest.raises(DataError, match="texts come as"):
        load_dataset(tmp_path, "text")
    with pytest.raises(DataError, match=r"holds no folder. Put the images of each class into a folder"):
        load_dataset(tmp_path, "image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"class folder .*empty holds no PNG"):
        load_dataset(tmp_path, "image")


def test_a_missing_place_or_column_says_which_option_names_it(tmp_path):
    """Data that moved, and a table whose columns have other names."""
    with pytest.raises(DataError, match="edgeward export takes --data"):
        load_dataset(tmp_path / "nowhere", "text")
    path = write_csv(tmp_path / "a.csv", [["message", "label"], ["one", "a"]])
    with pytest.raises(
        DataError, match=r"no column 'text'; its columns are message, label\. .*--input-column and --label-"
    ):
        load_dataset(path, "text")


def test_unreadable_images_are_counted_and_named(tmp_path):
    """A truncated image is an error that names it, unless so many may be bad; then it is left out."""
    write_digits(tmp_path, 100)
    whole = sorted((tmp_path / "3").glob("*.png"))
    for path in whole[:2]:
        path.write_bytes(path.read_bytes()[:60])

    with pytest.raises(DataError, match=f"2 bad of 100 .*3/{whole[0].name} cannot be used"):
        load_dataset(tmp_path, "image", max_bad=1)

    assert len(load_dataset(tmp_path, "image", max_bad=2)) == 98


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", r"cannot be used: not a PNG or JPEG \(0 bytes\)\.$"),
        (Image.new("1", (8000, 8000)), "cannot be used: image has 8000 × 8000 pixels; the limit is 50000000"),
        (Image.new("L", (2000, 1)), "cannot be used: image of 2000 × 1 pixels is too narrow"),
    ],
    ids=["empty", "large", "narrow"],
)
def test_what_the_preprocessing_refuses_is_a_bad_example(tmp_path, image, says):
    """An image that can be decoded but not used counts as one that cannot be decoded."""
    write_digits(tmp_path, 100)
    path = tmp_path / "0" / "odd.png"
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path)

    with pytest.raises(DataError, match=f"The first: 0/odd.png {says}"):
        load_dataset(tmp_path, "image")
    assert len(load_dataset(tmp_path, "image", max_bad=1)) == 100


def test_two_columns_are_pairs_of_texts(tmp_path):
    """A pair is its JSON, in UTF-8 without escapes; the order of the columns is that of the texts."""
    rows = [[f"né {i}", i % 2, f'"中文" {i}'] for i in range(6)]
    path = write_csv(tmp_path / "a.csv", [["first", "label", "second"], *rows])
    dataset = load_dataset(path, "text", input_column=("second", "first"))

    assert dataset.input_columns == ("second", "first")
    assert dataset.raw(3) == '["\\"中文\\" 3", "né 3"]'.encode()
    assert json.loads(dataset.raw(3)) == ['"中文" 3', "né 3"]
    assert dataset.hashes[3] == hashlib.sha256(dataset.raw(3)).hexdigest()


def test_pair_with_an_empty_text_is_bad(tmp_path):
    """Both texts are needed, and the one that is missing is named."""
    rows = [["a", "x", "b"], ["c", "y", ""], ["d", "x", "e"], ["f", "y", "g"], ["h", "y", "i"]]
    path = write_csv(tmp_path / "a.csv", [["first", "label", "second"], *rows])
    with pytest.raises(DataError, match=r"1 bad of 5 .* row 2 has no second"):
        load_dataset(path, "text", input_column=("first", "second"))


@pytest.mark.parametrize(
    ("modality", "inputs", "message"),
    [
        ("text", ("text", "text"), "'text' is given 2 times"),
        ("text", ("a", "b", "c"), "3 input columns, a, b, c; texts have at most 2"),
        ("image", ("a", "b"), "2 input columns, a, b; images have at most 1"),
        ("text", ("text", "other"), "no column 'other'; its columns are text, label"),
    ],
)
def test_wrong_input_columns_are_refused(tmp_path, modality, inputs, message):
    """Too many, one twice, and one that is not there."""
    path = write_csv(tmp_path / "a.csv", [HEADER, ["a", "x"], ["b", "y"]])
    with pytest.raises(DataError, match=message):
        load_dataset(path, modality, input_column=inputs)


def test_unreadable_rows_are_counted_and_named(tmp_path):
    """Lines that are not JSON and rows of another width are left out when allowed; the others keep their numbers."""
    lines = [json.dumps({"text": f"t {i}", "label": i % 2}) for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "{", "", "[]", *lines[1:]]))
    rows = [[f"t {i}", str(i % 2)] for i in range(6)]
    write_csv(tmp_path / "a.csv", [HEADER, rows[0], ["surplus", "0", "x"], ["short"], *rows[1:]])

    for name, first in [("a.jsonl", "line 2 is not JSON"), ("a.csv", "row 2 has 3 columns instead of 2")]:
        with pytest.raises(DataError, match=rf"2 bad of 8 examples \(--max-bad is 1\). The first: {first}"):
            load_dataset(tmp_path / name, "text", max_bad=1)
        with captured() as logs:
            dataset = load_dataset(tmp_path / name, "text", max_bad=2)
        assert [entry["count"] for entry in logs] == [2]
        assert [dataset.raw(i) for i in range(6)] == [f"t {i}".encode() for i in range(6)]
        assert dataset.names[1] == {"a.jsonl": "line 5", "a.csv": "row 4"}[name]


def test_contradictions_are_counted(tmp_path):
    """Equal examples with different labels are kept, and warned about with their number."""
    rows = [HEADER, ["a", "x"], ["a", "y"], ["b", "x"], ["c", "y"], ["d", "x"]]
    with captured() as logs:
        dataset = load_dataset(write_csv(tmp_path / "a.csv", rows), "text")

    assert len(dataset) == 5
    assert [entry["contents"] for entry in logs if entry["level"] == "warning"] == [1]
