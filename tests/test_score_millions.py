"""Twenty thousand rows of mixed quality by the real command; benchmarks/score_millions.py has a million of them."""

import pytest

from benchmarks import mixed_rows
from benchmarks.score_millions import run
from tests.serve_bundles import write_words_bundle

ROWS = 20_000
TEXTS = ("这部电影很好", "Film 难看", "谁知道", "很好 film", "好")


def test_every_row_is_there_once_and_the_right_ones_are_bad(tmp_path):
    """Word vectors; Parquet, CSV and JSONL; the totals of the command, of the parts and of the input are the same."""
    bundle = write_words_bundle(tmp_path / "reviews")
    mixed_rows.write(tmp_path / "data", ROWS, TEXTS)
    options = ("--column", "review=text", "--unit-rows", "500", "--processes", "2", "--threads", "1")
    scored = run(bundle, tmp_path / "data", tmp_path / "out", ROWS, *options)

    assert (scored.rows, scored.bad) == (ROWS, ROWS // mixed_rows.EVERY)
    (tmp_path / "out" / "part-000002-000003.parquet").unlink()
    with pytest.raises(ValueError, match=r"c\.jsonl"):
        mixed_rows.count(tmp_path / "out", ROWS)
