"""Feature vectors: from columns of numbers and from .npz arrays, and every reason to refuse them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bundle.errors import DataError
from bundle.log import captured
from finetune.data import load_dataset
from tests.finetune_examples import write_csv

X = np.array([[0.1, 2], [3, -4.5], [5, 6], [7, 8], [9, 1e-3], [11, 12]])
Y = ["a", "b", "a", "b", "a", "b"]


def rows(dataset):
    return np.stack([np.frombuffer(dataset.raw(i), dtype="<f4") for i in range(len(dataset))])


def wide(folder, cells, header=("id", "f1", "note", "f2", "label")):
    return write_csv(folder / "a.csv", [header, *cells])


def npz(folder, **arrays):
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def test_columns_of_numbers_are_a_vector(tmp_path):
    """Named columns in the order of their names, from every format, and the same bytes from an .npz."""
    cells = [[i, x[0], "n", x[1], y] for i, (x, y) in enumerate(zip(X.tolist(), Y, strict=True))]
    csv = load_dataset(wide(tmp_path, cells), "vector", input_column=("f2", "f1"))
    columns = {"f1": X[:, 0], "f2": X[:, 1], "label": Y}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    lines = [{"f1": x[0], "f2": x[1], "label": y} for x, y in zip(X.tolist(), Y, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))

    assert (csv.input_columns, csv.feature_names) == (("f2", "f1"), ("f2", "f1"))
    np.testing.assert_array_equal(rows(csv), X[:, ::-1].astype(np.float32))
    for name in ("a.parquet", "a.jsonl"):
        assert load_dataset(tmp_path / name, "vector", input_column=("f2", "f1")).sha256 == csv.sha256
    arrays = load_dataset(npz(tmp_path, x=X[:, ::-1], y=np.array(Y)), "vector")
    assert (arrays.sha256, arrays.feature_names) == (csv.sha256, ())


def test_without_names_all_columns_of_numbers_are_taken(tmp_path):
    """In the file's order, without the labels; columns of text are left out, and named in a warning."""
    cells = [[i, x[0], "n", x[1], i % 2] for i, x in enumerate(X.tolist())]
    with captured() as logs:
        dataset = load_dataset(wide(tmp_path, cells), "vector")

    assert dataset.input_columns == dataset.feature_names == ("id", "f1", "f2")
    assert [entry["columns"] for entry in logs] == [["note"]]
    lines = [{"f1": x[0], "label": "ab"[i % 2], "late": i, "note": [1]} for i, x in enumerate(X.tolist())]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_dataset(tmp_path / "a.jsonl", "vector").input_columns == ("f1", "late")


@pytest.mark.parametrize("value", ["", "NaN", "inf", "1e39", "-inf", "many", "1_0"])
def test_row_with_a_value_that_is_not_finite_is_bad(tmp_path, value):
    """Gaps, NaN, infinities, what is too large for float32, and text: counted, named, left out when allowed."""
    cells = [[i, x[0], "n", x[1], y] for i, (x, y) in enumerate(zip(X.tolist(), Y, strict=True))]
    cells[1][3] = value
    path = wide(tmp_path, [*cells, [6, 1, "n", 2, "b"]])
    with pytest.raises(DataError, match=r"1 bad of 7 .* row 2 has .* in column 'f2', not a finite number"):
        load_dataset(path, "vector", input_column=("f1", "f2"))

    dataset = load_dataset(path, "vector", input_column=("f1", "f2"), max_bad=1)
    assert dataset.names[:2] == ["row 1", "row 3"]
    np.testing.assert_array_equal(rows(dataset)[1], np.float32([5, 6]))


def test_jsonl_cells_that_are_no_numbers_make_bad_rows(tmp_path):
    """Missing keys, null, lists and numbers beyond float64, as much as NaN."""
    broken = ["{}", '{"f": null}', '{"f": [1]}', '{"f": NaN}', '{"f": "x"}', f'{{"f": 1{"0" * 400}}}']
    good = [json.dumps({"f": x[0], "label": y}) for x, y in zip(X.tolist(), Y, strict=True)]
    broken = [line[:-1] + (", " if len(line) > 2 else "") + '"label": "a"}' for line in broken]
    (tmp_path / "a.jsonl").write_text("\n".join([*good, *broken]))

    with pytest.raises(DataError, match=r"6 bad of 12 .* line 7 has None in column 'f'"):
        load_dataset(tmp_path / "a.jsonl", "vector", input_column=("f",), max_bad=5)
    assert len(load_dataset(tmp_path / "a.jsonl", "vector", input_column=("f",), max_bad=6)) == 6


@pytest.mark.parametrize(
    ("header", "inputs", "message"),
    [
        (("a", "b", "label"), ("c",), "no column 'c'; its columns are a, b, label"),
        (("a", "b", "label"), ("a", "a"), "input column 'a' is given 2 times"),
        (("a", "b", "label"), ("a", "label"), "'label' cannot be both input and label"),
        (("a", "a", "label"), (), "2 columns with the name 'a'"),
        (("label", "b", "c"), (), "no column of numbers but its labels; its columns are b, c"),
    ],
)
def test_wrong_columns_are_refused(tmp_path, header, inputs, message):
    """Columns that are missing, given twice, ambiguous, or not numbers."""
    values = {"a": "1", "b": "t", "c": "u", "label": "x"}
    path = write_csv(tmp_path / "a.csv", [header, [values[name] for name in header]])
    with pytest.raises(DataError, match=message):
        load_dataset(path, "vector", input_column=inputs)


def test_columns_of_other_types_are_refused(tmp_path):
    """A Parquet column of lists is not a column of numbers."""
    pq.write_table(pa.table({"f": [[1.0], [2.0]], "label": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'f' of .* holds list.*, not numbers"):
        load_dataset(tmp_path / "a.parquet", "vector", input_column=("f",))


@pytest.mark.parametrize(
    ("y", "kind", "labels", "values"),
    [
        (np.array([0, 10, 9, 0, 10, 9]), "multiclass", ("0", "10", "9"), [0, 1, 2, 0, 1, 2]),
        (np.array(["b", "a", "a", "b", "b", "a"]), "multiclass", ("a", "b"), [1, 0, 0, 1, 1, 0]),
        (np.array([b"b", b"a", b"a", b"b", b"b", b"a"]), "multiclass", ("a", "b"), [1, 0, 0, 1, 1, 0]),
        (np.array([True, False] * 3), "multiclass", ("false", "true"), [1, 0] * 3),
        (np.array([[3], [4]] * 3), "multiclass", ("3", "4"), [0, 1] * 3),
        (np.float32([0.5, 1, 2, 3, 4, 5]), "regression", (), [0.5, 1, 2, 3, 4, 5]),
        (np.array([[0, 1], [1, 1], [0, 0]] * 2), "multilabel", ("0", "1"), [[0, 1], [1, 1], [0, 0]] * 2),
    ],
)
def test_kind_of_an_array_is_that_of_its_type(tmp_path, y, kind, labels, values):
    """Whole numbers, truth values and text are labels, floats are numbers, two axes are sets of labels."""
    dataset = load_dataset(npz(tmp_path, x=X, y=y), "vector")
    (target,) = dataset.targets

    assert (dataset.input_columns, dataset.label_columns) == (("x",), ("y",))
    assert (target.name, target.kind, target.labels) == ("y", kind, labels)
    np.testing.assert_array_equal(target.values, values)


def test_arrays_may_be_named_and_given_a_kind(tmp_path):
    """Several label arrays, gaps in them, and floats as labels."""
    rough, fine = np.array([0, 1, np.nan, 1, 0, 1]), np.arange(6)
    tags = np.array([[0, 1], [1, 0], [np.nan, np.nan]] * 2)
    path = npz(tmp_path, features=X, rough=rough, fine=fine, tags=tags, bars=np.array(["p|q", "", "p"] * 2))
    columns = ("rough:multiclass", "fine:regression:2", "tags", "bars:multilabel")
    dataset = load_dataset(path, "vector", input_column=("features",), label_column=columns)

    rough, fine, tags, bars = dataset.targets
    assert (rough.labels, rough.values.tolist()) == (("0", "1"), [0, 1, -1, 1, 0, 1])
    assert (fine.kind, dataset.weights) == ("regression", (1.0, 2.0, 1.0, 1.0))
    assert tags.known.tolist() == [True, True, False] * 2
    assert (bars.labels, bars.known.tolist()) == (("p", "q"), [True, False, True] * 2)


def test_bad_entries_of_arrays_are_counted_and_named(tmp_path):
    """NaN and infinite features, infinite targets, missing targets, and sets of labels that are not 0 and 1."""
    x, y, tags = X.copy(), np.arange(6.0), np.array([[0, 1], [0, 0], [1, 1]] * 2)
    x[1, 1], y[2], y[3], tags[4, 0] = np.nan, np.inf, np.nan, 2
    tags[3] = 1, 0
    path = npz(tmp_path, x=x, y=y, tags=tags)
    with pytest.raises(DataError, match=r"3 bad of 6 .* x\[1\] has nan at position 1"):
        load_dataset(path, "vector", max_bad=2)
    with pytest.raises(DataError, match=r"3 bad of 6 .* x\[1\] has nan"):
        load_dataset(path, "vector", label_column=("y", "tags"), max_bad=2)

    dataset = load_dataset(path, "vector", label_column=("y", "tags"), max_bad=3)
    assert dataset.names == ["x[0]", "x[3]", "x[5]"]
    assert np.isnan(dataset.targets[0].values).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X, "y": np.arange(5)}, "of differing lengths: 6 'x', 5 'y'"),
        ({"x": X, "z": np.arange(6)}, "no array 'y'; its arrays are x, z"),
        ({"data": X, "y": np.arange(6)}, "no array 'x'; its arrays are data, y"),
        ({"x": X[:, 0], "y": np.arange(6)}, r"'x' of .* has shape \(6,\), not \(examples, features\)"),
        ({"x": X[:, :0], "y": np.arange(6)}, r"has shape \(6, 0\)"),
        ({"x": X.astype(complex), "y": np.arange(6)}, "'x' of .* holds complex128, not numbers"),
        ({"x": X.astype(object), "y": np.arange(6)}, "array 'x' of .* cannot be read: Object arrays"),
        ({"x": X, "y": np.array(Y, dtype=object)}, "array 'y' of .* cannot be read: Object arrays"),
        ({"x": X, "y": np.float64(3)}, "'y' of .* is a single value"),
        ({"x": X, "y": np.zeros((6, 2, 2))}, r"has shape \(6, 2, 2\), which is no regression label"),
        ({"x": X, "y": np.zeros((6, 2), dtype="U1")}, r"has shape \(6, 2\), which is no multilabel label"),
        ({"x": X, "y": np.zeros(6, dtype="M8[s]")}, r"holds datetime64\[s\], neither numbers nor text"),
        ({"x": X, "y": np.array([b"\xff"] * 6)}, "text that is not UTF-8"),
        ({"x": X, "y": np.array([[1, 0], [0, 0]] * 3)}, "fewer than 2 different examples, '1' the first"),
        ({"x": X[:0], "y": np.arange(0)}, "has no examples"),
        ({"x": X, "y": np.ones(6)}, "has one value of 'y', 1.0"),
        ({"x": X, "y": np.ones(6, dtype=int)}, "has one label, '1'"),
        ({"x": X, "y": np.arange(6)}, "6 labels are numbers: to predict a number, give --label-column y:regression"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path, arrays, message):
    """Wrong names, lengths, shapes and types, arrays of Python objects, and labels that teach nothing."""
    with pytest.raises(DataError, match=message):
        load_dataset(npz(tmp_path, **arrays), "vector")


def test_broken_npz_is_refused(tmp_path):
    """Not a zip file, a cut-off one, a damaged one, and a single array, each by one clear error."""
    whole = npz(tmp_path, x=X, y=np.array(Y)).read_bytes()
    for name, content in [("text", b"not really"), ("cut", whole[:200]), ("empty", b"")]:
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.npz cannot be read as .npz"):
            load_dataset(path, "vector")
    middle = whole.index(b"NUMPY") + 90
    (tmp_path / "damaged.npz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(DataError, match=r"array 'x' of .*damaged.npz cannot be read"):
        load_dataset(tmp_path / "damaged.npz", "vector")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, X)
    with pytest.raises(DataError, match="is a single array"):
        load_dataset(tmp_path / "single.npz", "vector")


def test_input_arrays_are_one_and_no_label(tmp_path):
    """Two arrays of vectors, and one that is input and label, are refused."""
    path = npz(tmp_path, x=X, y=np.arange(6))
    with pytest.raises(DataError, match="are one array, not 2: x, y"):
        load_dataset(path, "vector", input_column=("x", "y"))
    with pytest.raises(DataError, match="array 'y' cannot be both input and label"):
        load_dataset(path, "vector", input_column=("y",))


def test_vectors_and_other_data_are_not_confused(tmp_path):
    """Texts and images from an .npz, and vectors from a folder, are refused with what would do."""
    path = npz(tmp_path, x=X, y=np.arange(6))
    for modality in ("text", "image"):
        with pytest.raises(DataError, match=f"holds vectors, and the model takes {modality}s"):
            load_dataset(path, modality)
    with pytest.raises(DataError, match=r"holds images; vectors come as a file: \.csv .* or \.npz"):
        load_dataset(tmp_path, "vector")


def test_equal_vectors_are_equal_content(tmp_path):
    """What is the same number in float32 is the same example."""
    x = np.array([[0.1, 1], [np.float32(0.1), 1], [2, 1], [3, 1]])
    dataset = load_dataset(npz(tmp_path, x=x, y=np.array([1, 0, 1, 0])), "vector")

    assert dataset.hashes[0] == dataset.hashes[1]
    assert len(set(dataset.hashes)) == 3
