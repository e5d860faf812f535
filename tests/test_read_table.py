"""Is every CSV that a user hands in read alike, and every mistake in one a message with file, found and remedy?"""

import pytest

from features.console import UserError
from features.tables import read_table


def test_cells_come_as_strings_with_the_line_that_each_row_ends_on(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeffid,note\r\n001,"two\nlines"\r\nb,\r\n'.encode())
    table = read_table(path, required=("id",))
    assert list(table) == [{"id": "001", "note": "two\nlines"}, {"id": "b", "note": ""}]
    assert table.columns["id"] == ["001", "b"]
    assert table.lines == [row.line for row in table] == [3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"t.csv lacks the columns id and label; it has none. Expected"),
        (b"id\na\n", r"t.csv lacks the column label; it has id"),
        (b"id,label\n", "no rows below its header"),
        (b"id,label\na,1\nb\nc,1,2\n", r"2 of 3 rows do not have the header's 2 cells \(line 3, line 4\)"),
        (b"\xff\xfe\x00", "t.csv, line 1: bytes that are no text"),
        (b"id,label\na\x00,1\n", "t.csv, line 2: bytes that are no text in utf-8"),
    ],
)
def test_a_faulty_file_is_one_message(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t.csv", required=("id", "label"))


def test_a_file_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(
        UserError, match=r"no.csv does not exist. Expected a table as text: .* with id in its first line"
    ):
        read_table(tmp_path / "no.csv", required=("id",))
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path, required=("id",))
