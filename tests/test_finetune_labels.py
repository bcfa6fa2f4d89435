"""Label columns: one or several, of every kind, with gaps, and every reason to refuse them."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bundle.errors import DataError
from bundle.log import captured
from finetune.data import load_dataset
from tests.finetune_examples import write_csv

SEVERAL = ("topic", "tags:multilabel:0.5", "price:regression:2")


def several(count=12):
    """Rows of text, topic, tags and price; each label is missing somewhere."""
    tags = ["red|blue", "|", "red", "", "blue|green", "green"]
    rows = [[f"text {i}", f"topic {i % 2}", tags[i % 6], str(i / 4)] for i in range(count)]
    rows[1][1] = rows[2][3] = ""
    return rows


def table(folder, rows, header=("text", "topic", "tags", "price")):
    return write_csv(folder / "a.csv", [header, *rows])


def test_several_columns_are_several_targets(tmp_path):
    """Each has its kind, its weight and its values; an empty cell is a missing label."""
    dataset = load_dataset(table(tmp_path, several()), "text", label_column=SEVERAL)
    topic, tags, price = dataset.targets

    assert dataset.label_columns == SEVERAL
    assert dataset.weights == (1.0, 0.5, 2.0)
    assert [(t.name, t.kind, t.labels) for t in dataset.targets] == [
        ("topic", "multiclass", ("topic 0", "topic 1")),
        ("tags", "multilabel", ("blue", "green", "red")),
        ("price", "regression", ()),
    ]
    assert topic.values[:4].tolist() == [0, -1, 0, 1]
    np.testing.assert_array_equal(tags.values[:4], [[1, 0, 1], [0, 0, 0], [0, 0, 1], [np.nan] * 3])
    np.testing.assert_array_equal(price.values[:4], [0, 0.25, np.nan, 0.75])
    assert (topic.values.dtype, tags.values.dtype, price.values.dtype) == (np.int64, np.float32, np.float64)
    assert [t.known.sum() for t in dataset.targets] == [11, 10, 11]


def test_every_format_has_the_same_labels(tmp_path):
    """Lists of labels in JSONL and Parquet are the cells with bars of a CSV, null is empty, numbers are numbers."""
    rows = several()
    csv = load_dataset(table(tmp_path, rows), "text", label_column=SEVERAL)
    lists = [None if tags == "" else [tag for tag in tags.split("|") if tag] for _, _, tags, _ in rows]
    prices = [float(price) if price else None for *_, price in rows]
    columns = {"text": [r[0] for r in rows], "topic": [r[1] or None for r in rows], "tags": lists, "price": prices}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    for name in ("a.parquet", "a.jsonl"):
        other = load_dataset(tmp_path / name, "text", label_column=SEVERAL)
        assert other.sha256 == csv.sha256
        for ours, theirs in zip(csv.targets, other.targets, strict=True):
            assert ours.labels == theirs.labels
            np.testing.assert_array_equal(ours.values, theirs.values)


def test_digest_is_as_documented(tmp_path):
    """One multiclass label is written as it is, everything else as a JSON list; so old checkpoints find their data."""
    rows = [[f"text {i}", ["a", "b"][i % 2], "x|y" if i % 2 else "|", i / 2] for i in range(6)]
    path = table(tmp_path, rows)
    contents = [hashlib.sha256(row[0].encode()).hexdigest() for row in rows]

    def digest(lines):
        lines = sorted(f"{content} {line}\n" for content, line in zip(contents, lines, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    one = load_dataset(path, "text", label_column=("topic",))
    assert one.sha256 == digest(row[1] for row in rows)
    several = load_dataset(path, "text", label_column=SEVERAL)
    lines = [f'["{row[1]}",{json.dumps(["x", "y"] if row[2] != "|" else [], separators=(",", ":"))},{row[3]!r}]'
             for row in rows]  # fmt: skip
    assert several.sha256 == digest(lines)


def test_row_without_any_label_is_bad(tmp_path):
    """A gap in one of several tasks is allowed, a gap in all of them is counted and named."""
    rows = [*several(), ["text 12", "", " ", ""]]
    with pytest.raises(DataError, match=r"1 bad of 13 .* row 13 has no topic and no tags and no price"):
        load_dataset(table(tmp_path, rows), "text", label_column=SEVERAL)

    assert len(load_dataset(table(tmp_path, rows), "text", label_column=SEVERAL, max_bad=1)) == 12


def test_bad_number_makes_a_bad_row(tmp_path):
    """Text and infinity where a number belongs, even among several tasks; nan is a missing number."""
    rows = several()
    rows[3][3], rows[4][3], rows[5][3], rows[6][3] = "cheap", "inf", "1_000", "nan"
    with pytest.raises(DataError, match=r"3 bad of 12 .* row 4 has 'cheap' as price, which is not a finite number"):
        load_dataset(table(tmp_path, rows), "text", label_column=SEVERAL, max_bad=2)

    dataset = load_dataset(table(tmp_path, rows), "text", label_column=SEVERAL, max_bad=3)
    assert dataset.names[3] == "row 7"
    assert np.isnan(dataset.targets[2].values[3])
    assert dataset.raw(3) == b"text 6"


def test_label_of_bad_rows_alone_is_no_label(tmp_path):
    """What only left-out rows have is not learned, and the others keep their labels."""
    rows = [["a", "x", "p"], ["", "only", "rare"], ["b", "y", "q|p"], ["c", "x", "q"], ["d", "y", "p"]]
    path = table(tmp_path, rows, ("text", "topic", "tags"))
    topic, tags = load_dataset(path, "text", label_column=("topic", "tags:multilabel"), max_bad=1).targets

    assert (topic.labels, topic.values.tolist()) == (("x", "y"), [0, 1, 0, 1])
    assert (tags.labels, tags.values.tolist()) == (("p", "q"), [[1, 0], [1, 1], [0, 1], [1, 0]])


def test_column_with_a_colon_needs_its_kind(tmp_path):
    """Kind and weight are taken from the end, the rest is the name."""
    path = table(tmp_path, [[f"t {i}", i % 2] for i in range(4)], ("text", "a:b"))

    assert load_dataset(path, "text", label_column=("a:b:multiclass:3",)).targets[0].name == "a:b"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("topic:multiclas",), "'topic:multiclas' has no kind that there is: .* multiclass, multilabel, regression"),
        (("topic:multiclass:0",), "has the weight '0', which is not a positive number"),
        (("topic:multiclass:-1",), "weight '-1'"),
        (("topic:multiclass:inf",), "weight 'inf'"),
        (("topic:multiclass:nan",), "weight 'nan'"),
        (("topic:multiclass:much",), "weight 'much'"),
        (("topic", "topic:multilabel"), "'topic' is given 2 times"),
        (("text",), "'text' cannot be both input and label"),
        (("topics",), "no column 'topics'; its columns are text, topic, tags, price"),
    ],
)
def test_unusable_label_column_is_refused(tmp_path, columns, message):
    """Unknown kinds, weights that are not positive, and columns that are missing or used twice."""
    with pytest.raises(DataError, match=message):
        load_dataset(table(tmp_path, several()), "text", label_column=columns)


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        ("y:regression", ["1", "1.0", "1"], "has one value of 'y', 1.0; a regression needs different ones"),
        ("y:multilabel", ["a|b", "b|a", "a | b"], "every example of .* has the same labels, a, b"),
        ("y:multilabel", ["|", "|", "|"], "has no labels"),
        ("y:multilabel", ["a|b", "a", "a"], "fewer than 2 different examples, 'b' the first"),
        ("y", ["1.5", "2.5", "3.5"], "3 labels are numbers: to predict a number, give --label-column y:regression"),
        ("y", ["a", "b", "c"], r"'a' the first\. Add examples"),
    ],
)
def test_labels_that_teach_nothing_are_refused(tmp_path, column, cells, message):
    """One value, one set of labels, none at all, too few of one; and a hint where numbers were taken for labels."""
    path = table(tmp_path, [[f"t {i}", cell] for i, cell in enumerate(cells)], ("text", "y"))
    with pytest.raises(DataError, match=message):
        load_dataset(path, "text", label_column=(column,))


def test_the_column_at_fault_is_named(tmp_path):
    """Of several tasks, the error says which one it is about."""
    rows = [[f"t {i}", i % 2, "same"] for i in range(6)]
    with pytest.raises(DataError, match=r"column 'other' of .* has one label, 'same'"):
        load_dataset(table(tmp_path, rows, ("text", "y", "other")), "text", label_column=("y", "other"))

    rows = [[f"t {i}", i % 2, ""] for i in range(6)]
    with pytest.raises(DataError, match=r"column 'other' of .* has no known value"):
        load_dataset(table(tmp_path, rows, ("text", "y", "other")), "text", label_column=("y", "other:regression"))


def test_lists_are_for_multilabel_columns(tmp_path):
    """A list where one label or a number belongs is refused, and the kind for it is named; an object never fits."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "y": ["p"]}\n{"text": "b", "y": ["q"]}\n')
    for column in ("y", "y:regression"):
        with pytest.raises(DataError, match=r"holds lists, such as \['p'\]; sets of labels are y:multilabel"):
            load_dataset(path, "text", label_column=(column,))
    path.write_text('{"text": "a", "y": {"p": 1}}\n')
    with pytest.raises(DataError, match=r"'y' in line 1 of .* is a dict, not text"):
        load_dataset(path, "text", label_column=("y:multilabel",))


def test_contradictions_are_counted_for_each_task(tmp_path):
    """Equal examples with different values are kept, and warned about with their number and task."""
    rows = [["a", "x", 1], ["a", "y", 2], ["a", "", 3], ["b", "x", 4], ["b", "x", 5], ["c", "y", 6], ["d", "y", 6]]
    path = table(tmp_path, rows, ("text", "topic", "price"))
    with captured() as logs:
        dataset = load_dataset(path, "text", label_column=("topic", "price:regression"))

    assert len(dataset) == 7
    assert [(entry["task"], entry["contents"]) for entry in logs] == [("topic", 1), ("price", 2)]
