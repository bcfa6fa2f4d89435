"""Every kind of file and of bundle: the answers are those of bundle.model.Model.predict, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bundle import tensors, vector
from bundle.errors import DataError
from bundle.model import load_model
from bundle.text import join_pair
from tests import serve_bundles as bundles
from tests.score_examples import TEXTS, lists, read, run, scored, write_csv

VECTORS = np.array([[0.5, -1, 2], [0, 0, 0], [1e-3, 7, -2.25], [1, 2, 3], [3, 2, 1]], np.float64)
PLOTS = {
    "counts:0": np.arange(30, dtype=np.int32).reshape(5, 2, 3),
    "scale": np.array([0.5, 1, 2, -1, 0], np.float32),
    "known": np.array([[True, False], [True, True], [False, False], [True, True], [False, True]]),
}


@pytest.fixture(scope="module")
def mood(tmp_path_factory):
    return bundles.write_text_bundle(tmp_path_factory.mktemp("bundle") / "mood", tasks=bundles.TASKS)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    return bundles.write_vector_bundle(tmp_path_factory.mktemp("bundle") / "flowers")


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    return bundles.write_tensors_bundle(tmp_path_factory.mktemp("bundle") / "plots")


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    return bundles.write_image_bundle(tmp_path_factory.mktemp("bundle") / "colour")


def assert_answers(table, bundle, raws):
    """Every column of all three tasks holds what Model.predict gives for these examples."""
    expected = load_model(bundle, device="cpu").predict(raws)
    assert table["_status"].to_pylist() == [0] * len(raws)
    assert table["_error"].null_count == len(raws)
    assert table["mood.label"].to_pylist() == [label.decode() for label in expected["mood.label"][:, 0]]
    np.testing.assert_array_equal(table["mood.score"].to_numpy(), expected["mood.score"].max(axis=1))
    np.testing.assert_array_equal(lists(table, "mood.scores"), expected["mood.score"])
    np.testing.assert_array_equal(lists(table, "mood.logits"), expected["mood.logits"])
    names = [[label for label, holds in zip("xy", row, strict=True) if holds] for row in expected["tags.predicted"]]
    assert table["tags.predicted"].to_pylist() == names
    np.testing.assert_array_equal(lists(table, "tags.scores"), expected["tags.score"])
    np.testing.assert_array_equal(table["length.value"].to_numpy(), expected["length.value"][:, 0])


def write_texts(path: Path, texts, **columns) -> Path:
    columns = {"id": list(range(len(texts))), "text": texts, **columns}
    match path.suffix:
        case ".csv":
            return write_csv(path, columns)
        case ".parquet":
            parquet.write_table(pa.table(columns), path, row_group_size=3)
        case ".jsonl":
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".npz":
            np.savez(path, **{name: np.array(values) for name, values in columns.items()})
    return path


@pytest.mark.parametrize("unit_rows", [1, 2, 3, 100])
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".npz"])
def test_texts(mood, tmp_path, suffix, unit_rows):
    """However a file is cut into units, its rows are there in their order, with what is kept, and answered."""
    path = write_texts(tmp_path / f"texts{suffix}", TEXTS)
    options = {"keep": ("id",), "scores": True, "logits": True, "unit_rows": unit_rows}
    table = scored(mood, path, out=tmp_path / "out", **options)

    assert_answers(table, mood, [text.encode() for text in TEXTS])
    assert table["_file"].to_pylist() == [str(path)] * len(TEXTS)
    assert table["_row"].to_pylist() == list(range(len(TEXTS)))
    assert list(map(int, table["id"].to_pylist())) == list(range(len(TEXTS)))
    assert len(list((tmp_path / "out").glob("part-*"))) >= len(TEXTS) // unit_rows


def test_several_files_are_told_apart(mood, tmp_path):
    """Each has its own parts, and its rows say which file they are from."""
    for name in ("b", "a"):
        write_texts(tmp_path / f"{name}.csv", TEXTS)
    table = scored(mood, tmp_path, out=tmp_path / "out")

    assert table["_file"].to_pylist() == [str(tmp_path / f"{name}.csv") for name in "ab" for _ in TEXTS]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("part")) == [
        "part-000000-000000.parquet",
        "part-000001-000000.parquet",
    ]


def test_row_groups_larger_and_smaller_than_units(mood, tmp_path):
    """Small ones are joined, large ones cut; the numbers of the rows are those in the file."""
    path = tmp_path / "texts.parquet"
    table = pa.table({"text": TEXTS * 3})
    with parquet.ParquetWriter(path, table.schema) as writer:
        for start, size in ((0, 2), (2, 1), (3, 11), (14, 1), (15, 6)):
            writer.write_table(table.slice(start, size))
    written = scored(mood, path, out=tmp_path / "out", unit_rows=4, scores=True, logits=True)

    assert_answers(written, mood, [text.encode() for text in TEXTS * 3])
    assert written["_row"].to_pylist() == list(range(21))


def test_texts_of_other_types(mood, tmp_path):
    """Binary, large and dictionary columns are texts; numbers are as JSON writes them, as in training."""
    for number, column in enumerate(
        (
            pa.array([b"the film", b"bad"], pa.binary()),
            pa.array(["the film", "bad"], pa.large_string()),
            pa.array(["the film", "bad"]).dictionary_encode(),
        )
    ):
        parquet.write_table(pa.table({"text": column}), tmp_path / f"{number}.parquet")
        table = scored(mood, tmp_path / f"{number}.parquet", out=tmp_path / f"{number}", scores=True, logits=True)
        assert_answers(table, mood, [b"the film", b"bad"])
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}\n{"text": 1.5}\n{"text": true}\n')
    table = scored(mood, tmp_path / "numbers.jsonl", out=tmp_path / "numbers", scores=True, logits=True)
    assert_answers(table, mood, [b"3", b"1.5", b"true"])


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_pairs(tmp_path, suffix):
    """Both texts of a row are one example; a column may have another name."""
    bundle = bundles.write_pair_bundle(tmp_path / "answers", tasks=bundles.TASKS)
    path = write_texts(tmp_path / f"pairs{suffix}", TEXTS, question=TEXTS[::-1])
    options = {"column": ("question=text", "answer=question"), "scores": True, "logits": True}
    table = scored(bundle, path, out=tmp_path / "out", **options)

    pairs = zip(TEXTS, TEXTS[::-1], strict=True)
    assert_answers(table, bundle, [join_pair(*pair) for pair in pairs])


def test_words(tmp_path):
    """Texts that are cut into words, one of them without a word that is known."""
    pytest.importorskip("jieba")
    bundle = bundles.write_words_bundle(tmp_path / "reviews", tasks=bundles.TASKS)
    reviews = ["这部电影很好", "", "难看", "nothing known"]
    path = write_csv(tmp_path / "reviews.csv", {"review": reviews})
    table = scored(bundle, path, out=tmp_path / "out", scores=True, logits=True)

    assert_answers(table, bundle, [review.encode() for review in reviews])


def write_vectors(folder: Path) -> dict[str, Path]:
    """The same vectors in every way that a file may hold them."""
    rows = VECTORS.tolist()
    names = {name: VECTORS[:, place] for place, name in enumerate(bundles.FLOWER.names)}
    parquet.write_table(pa.table({"flower": rows}), folder / "lists.parquet")
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.ravel()), 3)
    parquet.write_table(pa.table({"flower": fixed}), folder / "fixed.parquet")
    parquet.write_table(pa.table(names), folder / "names.parquet")
    write_csv(folder / "names.csv", names)
    write_csv(folder / "json.csv", {"flower": [json.dumps(row) for row in rows]})
    (folder / "lists.jsonl").write_text("".join(json.dumps({"flower": row}) + "\n" for row in rows))
    (folder / "names.jsonl").write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    np.savez(folder / "named.npz", flower=VECTORS, other=np.zeros(9))
    np.savez_compressed(folder / "x.npz", x=VECTORS.astype(np.float32))
    np.savez(folder / "fortran.npz", flower=np.asfortranarray(VECTORS))
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("unit_rows", [2, 100])
def test_vectors(flowers, tmp_path, unit_rows):
    """A column of lists, a column for each number, an array: all are the same vectors."""
    raws = [vector.encode(row) for row in VECTORS]
    (tmp_path / "data").mkdir()
    for name, path in write_vectors(tmp_path / "data").items():
        options = {"unit_rows": unit_rows, "scores": True, "logits": True}
        assert_answers(scored(flowers, path, out=tmp_path / name, **options), flowers, raws)


def test_tensors(plots, tmp_path):
    """Named arrays of any shape, as an .npz, as nested lists, and flat where JSON has them."""
    raws = tensors.encode(PLOTS, bundles.PLOT)
    np.savez(tmp_path / "plots.npz", **PLOTS)
    columns = {name: array.tolist() for name, array in PLOTS.items()}
    parquet.write_table(pa.table(columns), tmp_path / "plots.parquet")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (tmp_path / "plots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_csv(tmp_path / "plots.csv", {name: [json.dumps(value) for value in rows] for name, rows in columns.items()})
    for suffix in ("npz", "parquet", "jsonl", "csv"):
        out = tmp_path / suffix
        table = scored(plots, tmp_path / f"plots.{suffix}", out=out, unit_rows=2, scores=True, logits=True)
        assert_answers(table, plots, raws)


@pytest.fixture
def photos(tmp_path):
    """A folder of eight images, and what each must be answered."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    raws = {}
    for number, colour in enumerate(("red", "blue", "green", "white", "black", "pink", "brown", "grey")):
        path = folder / ("deep" if number % 2 else ".") / f"{number}.png"
        path.write_bytes(bundles.png(colour, (8 + number, 8)))
        raws[str(path)] = path.read_bytes()
    return folder, raws


def assert_images(table, bundle, raws):
    expected = load_model(bundle, device="cpu").predict(raws)
    np.testing.assert_array_equal(lists(table, "scores"), expected["score"])
    assert table["label"].to_pylist() == [label.decode() for label in expected["label"][:, 0]]


@pytest.mark.parametrize("decoders", [1, 3])
def test_folder_of_images(colour, photos, tmp_path, decoders):
    """Sorted by path, each row with the image that it is of."""
    folder, raws = photos
    table = scored(colour, folder, out=tmp_path / "out", unit_rows=3, scores=True, decoders=decoders)

    assert table["_file"].to_pylist() == sorted(raws)
    assert table["_row"].to_pylist() == list(range(len(raws)))
    assert_images(table, colour, [raws[path] for path in sorted(raws)])


def test_lists_of_images(colour, photos, tmp_path):
    """In the order of the list, as a text file, a column of paths, or a column of bytes."""
    folder, raws = photos
    paths = sorted(raws, reverse=True)
    names = [str(Path(path).relative_to(folder)) for path in paths]
    (folder / "list.txt").write_text("\n".join(names))
    write_csv(folder / "list.csv", {"photo": names})
    parquet.write_table(pa.table({"photo": [raws[path] for path in paths]}), folder / "bytes.parquet")
    parquet.write_table(
        pa.table({"photo": [{"bytes": raws[path], "path": path} for path in paths]}), folder / "struct.parquet"
    )
    for name in ("list.txt", "list.csv", "bytes.parquet", "struct.parquet"):
        assert_images(scored(colour, folder / name, out=tmp_path / name, scores=True), colour, [*map(raws.get, paths)])


def test_chunks_and_batches_change_nothing(mood, tmp_path):
    """Rows of very different lengths, read and run in other pieces, are answered by the same bytes."""
    texts = [" ".join(["film"] * (number * 7 % 11)) for number in range(300)]
    path = write_texts(tmp_path / "texts.parquet", texts)
    for number, options in enumerate(({"batch": 1}, {"batch": 64}, {"batch": 7, "decoders": 3})):
        run(mood, path, out=tmp_path / str(number), scores=True, logits=True, unit_rows=100, **options)
    parts = [sorted((tmp_path / str(number)).glob("part-*")) for number in range(3)]

    assert len(parts[0]) > 1
    assert [part.read_bytes() for part in parts[0]] == [part.read_bytes() for part in parts[1]]
    assert [part.read_bytes() for part in parts[0]] == [part.read_bytes() for part in parts[2]]


def test_top_k(mood, tmp_path):
    """The highest labels with their scores, the first of them the answer; no more than there are."""
    path = write_texts(tmp_path / "texts.csv", TEXTS)
    two = scored(mood, path, out=tmp_path / "two", top_k=2, scores=True)
    many = scored(mood, path, out=tmp_path / "many", top_k=9)

    scores = lists(two, "mood.scores")
    np.testing.assert_array_equal(lists(two, "mood.top_scores"), -np.sort(-scores, axis=1)[:, :2])
    assert [labels[0] for labels in two["mood.top_labels"].to_pylist()] == two["mood.label"].to_pylist()
    assert {len(labels) for labels in many["mood.top_labels"].to_pylist()} == {3}
    assert {len(labels) for labels in many["tags.top_labels"].to_pylist()} == {2}
    assert "length.top_labels" not in many.column_names


def test_kept_columns_have_their_own_types(mood, tmp_path):
    """Of Parquet whatever they are; under another name where the answers have theirs."""
    columns = {
        "label": ["a", None],
        "when": pa.array([0, 1], pa.timestamp("us")),
        "numbers": [[1, 2], None],
        "text": ["bad", "film"],
    }
    parquet.write_table(pa.table(columns), tmp_path / "texts.parquet")
    keep = ("truth=label", "when", "numbers", "text")
    table = scored(mood, tmp_path / "texts.parquet", out=tmp_path / "out", keep=keep)

    assert table["truth"].to_pylist() == ["a", None]
    assert table["when"].type == pa.timestamp("us")
    assert table["numbers"].to_pylist() == [[1, 2], None]
    assert table["text"].to_pylist() == ["bad", "film"]


def test_kept_arrays_of_other_byte_order(mood, tmp_path):
    """They are the same numbers."""
    kept = {"big": np.array([1, 513], ">i4"), "half": np.array([0.5, 2], ">f2")}
    np.savez(tmp_path / "texts.npz", text=np.array(["bad", "film"]), **kept)
    table = scored(mood, tmp_path / "texts.npz", out=tmp_path / "out", keep=tuple(kept))

    assert table["big"].to_pylist() == [1, 513]
    assert table["half"].to_pylist() == [0.5, 2]


@pytest.mark.parametrize(
    "kept", [np.ones((2, 2)), np.array([b"a", b"b"]), np.array([0, 1], "M8[s]"), np.ones(2, complex), np.ones(2, "g")]
)
def test_arrays_that_no_column_holds_are_refused(mood, tmp_path, kept):
    """Before anything is scored."""
    np.savez(tmp_path / "texts.npz", text=np.array(["bad", "film"]), kept=kept)

    with pytest.raises(DataError, match=r"array 'kept' of .* cannot be kept"):
        run(mood, tmp_path / "texts.npz", out=tmp_path / "out", keep=("kept",))
    assert not (tmp_path / "out").exists()


def test_a_kept_column_may_not_take_the_name_of_an_answer(tmp_path):
    """The message says how to give it another."""
    bundle = bundles.write_text_bundle(tmp_path / "mood")
    path = write_csv(tmp_path / "texts.csv", {"text": ["bad"], "label": ["a"]})

    with pytest.raises(DataError, match="--keep NAME=label"):
        run(bundle, path, out=tmp_path / "out", keep=("label",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"body": ["x"]}, {}, "no columns 'text'.*body.*--column"),
        ({"text": ["x"]}, {"keep": ("id",)}, "no columns 'id'"),
        ({"text": ["x"]}, {"column": ("txt=text",)}, "no such input, only text"),
        ({"text": ["x"]}, {"keep": ("a=text", "a=text")}, "once"),
        ({"text": ["x"]}, {"top_k": -1}, "--top-k is -1"),
        ({"text": ["x"]}, {"unit_rows": -5}, "--unit-rows is -5"),
        ({"text": ["x"]}, {"shard": "3/3"}, "K/N"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(mood, tmp_path, columns, options, message):
    """One clear error, and no folder that a second try would stumble over."""
    path = write_csv(tmp_path / "texts.csv", columns)

    with pytest.raises(DataError, match=message):
        run(mood, path, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_a_file_that_is_none_of_its_kind_is_refused(mood, tmp_path, suffix):
    """Not one row of it could be told from another."""
    (tmp_path / f"broken{suffix}").write_bytes(b"\x00\xff" * 20)

    with pytest.raises(DataError, match="broken"):
        run(mood, tmp_path / f"broken{suffix}", out=tmp_path / "out")


def test_files_without_rows_are_scored(mood, tmp_path):
    """No parts, and a run that is done."""
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    (tmp_path / "none.csv").write_text("text\n")
    (tmp_path / "none.jsonl").write_text("")
    result = run(mood, *(tmp_path / f"none.{suffix}" for suffix in ("parquet", "csv", "jsonl")), out=tmp_path / "out")

    assert (result.counts.rows_in, result.parts, result.missing) == (0, 0, 0)
    assert (tmp_path / "out" / "_SUCCESS").is_file()


def test_object_stores_are_read_and_written_like_folders(mood, tmp_path):
    """By way of fsspec, here on a store in memory; a second run finds everything there."""
    system = pytest.importorskip("fsspec").filesystem("memory")
    for suffix in (".csv", ".parquet", ".jsonl"):
        system.pipe_file(f"/bucket/in/texts{suffix}", write_texts(tmp_path / f"t{suffix}", TEXTS).read_bytes())
    options = {"unit_rows": 2, "scores": True, "logits": True}
    try:
        run(mood, "memory://bucket/in", out=tmp_path / "out", **options)
        results = [run(mood, "memory://bucket/in", out="memory://bucket/out", **options) for _ in range(2)]
        stored = {path.rpartition("/")[2]: system.cat_file(path) for path in system.ls("/bucket/out", detail=False)}
    finally:
        system.rm("/bucket", recursive=True)

    assert results[0] == results[1]
    assert results[0].counts.rows_ok == 3 * len(TEXTS)
    assert_answers(read(tmp_path / "out").slice(0, len(TEXTS)), mood, [text.encode() for text in TEXTS])
    here = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*")}
    assert {name: data for name, data in stored.items() if name.startswith("part-")} == here
    assert "_SUCCESS" in stored


def test_a_header_of_another_encoding_is_refused(mood, tmp_path):
    """In words, not in the bytes that it is taken for."""
    (tmp_path / "a.csv").write_text("客户,text\n甲,a film\n", "gb18030")

    with pytest.raises(DataError, match=r"a.csv is not UTF-8. Convert it"):
        run(mood, tmp_path / "a.csv", out=tmp_path / "out")


@pytest.mark.parametrize(("name", "text"), [("a.csv", "text\na film\n"), ("a.jsonl", '{"text": "a film"}\n')])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_refused(mood, tmp_path, name, text, encoding):
    """As other programs export it: nothing in it could be scored."""
    path = tmp_path / name
    path.write_text("\ufeff" + text, encoding)

    with pytest.raises(DataError, match=rf"{name} is UTF-16. Convert it, .* iconv -f UTF-16 -t UTF-8"):
        run(mood, path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_columns_to_keep_of_two_types_are_refused(mood, tmp_path):
    """With the types by the names that Arrow gives them."""
    for name, values in (("a", [1]), ("b", ["x"])):
        parquet.write_table(pa.table({"text": ["a film"], "id": values}), tmp_path / f"{name}.parquet")

    with pytest.raises(DataError, match=r"keep are 'id' string in .*b\.parquet and 'id' int64 in .*a\.parquet\. Score"):
        run(mood, tmp_path / "a.parquet", tmp_path / "b.parquet", out=tmp_path / "out", keep=("id",))
    assert not (tmp_path / "out").exists()
