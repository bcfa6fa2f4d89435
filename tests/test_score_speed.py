"""What makes scoring fast changes no answer, and nothing is read or shared out in vain."""

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bundle import vector
from bundle.errors import BadInput
from bundle.model import load_model
from bundle.store import open_bundle
from score import plan, row_groups
from score.readers import Reader, Wanted
from tests import serve_bundles as bundles
from tests.score_examples import config, lists, scored

VECTORS = np.array([[0.5, -1, 2], [0, np.nan, 0], [1e-3, 7, -2.25], [np.inf, 2, 3], [3, 2, 1]], np.float32)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    return bundles.write_vector_bundle(tmp_path_factory.mktemp("bundle") / "flowers")


def write(path, vectors, **options):
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    parquet.write_table(pa.table({"flower": fixed}), path, **options)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_vector_that_is_not_finite_spoils_its_row_alone(flowers, tmp_path, batch):
    """Its error is that of bundle.vector; the others, read as one array with it, have the bits of Model.predict."""
    write(tmp_path / "a.parquet", VECTORS)

    table = scored(flowers, tmp_path / "a.parquet", out=tmp_path / "out", batch=batch, logits=True)

    model = load_model(flowers, device="cpu")
    expected = model.predict([vector.encode(row) for row in VECTORS[[0, 2, 4]]])
    assert table["_status"].to_pylist() == [0, 1, 0, 1, 0]
    good = table.filter(pa.array([True, False, True, False, True]))
    np.testing.assert_array_equal(lists(good, "mood.logits"), expected["mood.logits"])
    with pytest.raises(BadInput) as refused:
        model.encode(vector.encode(VECTORS[1]))
    assert table["_error"].to_pylist()[1] == str(refused.value)


def test_a_process_reads_no_row_group_of_another(flowers, tmp_path, monkeypatch):
    """Of units of a row group each, every second one is read; within a large row group it reads on."""
    path, seen, tables = tmp_path / "a.parquet", [], row_groups.tables

    def watched(*arguments):
        for group, row, rows in tables(*arguments):
            seen.append((group, row))
            yield group, row, rows

    monkeypatch.setattr(row_groups, "tables", watched)
    for group_rows, expected in ((10, [(0, 0), (2, 20)]), (40, [(0, 0), (0, 10), (0, 20)])):
        write(path, np.arange(120, dtype=np.float32).reshape(40, 3), row_group_size=group_rows)
        _, made = plan.prepare(config(flowers, path, out=tmp_path / "out", unit_rows=10))
        reader = Reader(Wanted(bundles.FLOWER, {}, {}), made.files, 10)
        read = [chunk.raws for unit in made.units[::2][:2] for chunk in reader.read(unit)]

        assert seen == expected
        assert np.concatenate(read)[:, 0].tolist() == [3.0 * row for row in [*range(10), *range(20, 30)]]
        seen.clear()


@pytest.mark.parametrize(("p50_ms", "rows"), [(0.001, 65536), (1.0, 2048), (3.45, 512), (9.0, 256), (1000.0, 256)])
def test_units_are_about_three_seconds_long(flowers, p50_ms, rows):
    """By the latency in the manifest, whatever the machine is: a run that goes on must cut them as before."""
    manifest = open_bundle(flowers).manifest
    variant = manifest.variants[0]
    latency = msgspec.structs.replace(variant.latency, p50_ms=p50_ms)
    slow = msgspec.structs.replace(manifest, variants=(msgspec.structs.replace(variant, latency=latency),))

    assert plan._unit_rows(slow) == rows
