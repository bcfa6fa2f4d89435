import csv
from io import BytesIO

import pytest

from bundle.errors import BadInput
from score.lines import CsvRows, JsonRows, between

CSV = (
    b"id,text\r\n"
    b'1,"two\nlines, and a ""quote"""\r\n'
    b"\r\n"
    b"2,plain\n"
    b'3,an inch " in the middle\n'
    b"4,\xff\xfe\n"
    b'"5","\n\n\n"\n'
    b"6,without an end"
)


def rows_with_offsets(rows):
    """Each row with the byte that the next one begins at."""
    return [(row, rows.offset) for row in rows]


def test_rows_of_csv_are_those_of_python():
    """Quoted line ends, blank lines, quotes in the middle of a field: the rows are what csv.reader reads."""
    text = CSV.decode("utf-8", "surrogateescape").splitlines(keepends=True)
    expected = [row for row in csv.reader(text) if row]

    assert list(CsvRows(BytesIO(CSV))) == expected
    assert len(expected) == 7


def test_a_byte_order_mark_is_no_part_of_a_quoted_field():
    """As spreadsheets write it: a mark, and a header in quotes, in which a comma may be; offsets count its bytes."""
    data = b'\xef\xbb\xbf"te,xt","id"\r\n"\xef\xbb\xbfa","1"\r\n'

    assert rows_with_offsets(CsvRows(BytesIO(data))) == [(["te,xt", "id"], 17), (["\ufeffa", "1"], len(data))]


@pytest.mark.parametrize("kind", [CsvRows, JsonRows])
def test_rows_that_are_read_from_any_boundary_are_the_same(kind):
    """From wherever a row begins, the file reads on as it would have from its beginning."""
    data = CSV if kind is CsvRows else b'\xef\xbb\xbf{"a": 1}\n\n{"a": "x\\ny"}\r\nno\n[1]\n{"a": 2}'
    whole = rows_with_offsets(kind(BytesIO(data)))

    for number, (_, start) in enumerate(whole):
        file = BytesIO(data)
        file.seek(start)
        rest = rows_with_offsets(kind(file, start))
        assert list(map(str, rest)) == list(map(str, whole[number + 1 :]))
    assert whole[-1][1] == len(data)


def test_bytes_that_are_not_utf8_can_be_had_back():
    """A field that is no UTF-8 keeps its bytes, so that the row can say what is wrong with it."""
    fields = next(row for row in CsvRows(BytesIO(CSV)) if row[0] == "4")

    assert fields[1].encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_a_quote_that_nobody_closes_is_one_bad_row():
    """The end of the file does not end a quoted field in silence."""
    rows = list(CsvRows(BytesIO(b'id,text\n1,fine\n2,"never\nends\n')))

    assert rows[1] == ["1", "fine"]
    assert isinstance(rows[2], BadInput)
    assert "quote" in str(rows[2])
    assert len(rows) == 3


def test_a_row_that_is_no_json_object_stands_alone():
    """What is wrong is said in its place, and the rows around it are read."""
    rows = list(JsonRows(BytesIO(b'{"a": 1}\n{"a": \n[1]\n\n{"a": "\xff"}\n{"a": 2}\n')))

    assert [isinstance(row, BadInput) for row in rows] == [False, True, True, True, False]


def test_a_range_owns_the_lines_that_begin_in_it():
    """A line that reaches beyond the range is in it; the next one is not."""
    assert list(between(BytesIO(b"ab\ncd\nef\n"), 4)) == [b"ab\n", b"cd\n"]
    assert list(between(BytesIO(b"ab\ncd\nef\n"), 3)) == [b"ab\n"]
