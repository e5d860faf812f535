"""Is every CSV that a user hands in read alike, and every mistake in one a message with file, found and remedy?"""

import pytest

from features.console import UserError
from features.tables import read_splits, read_table


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


# --- encodings and delimiters -----------------------------------------------------------------------------------------

CONTENT = "path,label,group\nä.png,1,S 1\nb.png,0,S 2\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_usual_encoding_and_delimiter_gives_the_same_cells(tmp_path, encoding, delimiter, newline):
    text = CONTENT.replace(",", delimiter).replace("\n", newline)
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    table = read_table(tmp_path / "t.csv", required=("path", "label"), optional=("group",))
    assert table.columns == {"path": ["ä.png", "b.png"], "label": ["1", "0"], "group": ["S 1", "S 2"]}


def test_a_guess_at_the_encoding_is_said(tmp_path, capsys):
    (tmp_path / "t.csv").write_bytes(CONTENT.encode("cp1252"))
    read_table(tmp_path / "t.csv", required=("path",))
    assert "not UTF-8; it was read as Windows-1252" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "what"), [(b"PK\x03\x04", "an Excel workbook"), (b"\x1f\x8b", "gzip"), (b"PAR1", "a Parquet file")]
)
def test_files_of_other_programs_are_named(tmp_path, start, what):
    (tmp_path / "t.csv").write_bytes(start + b"\0\1\2")
    with pytest.raises(UserError, match=what):
        read_table(tmp_path / "t.csv", required=("path",))


def read(tmp_path, text, required=("path", "label"), optional=("group", "split")):
    (tmp_path / "t.csv").write_text(text)
    return read_table(tmp_path / "t.csv", required=required, optional=optional)


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\npath;label\na.png;1\n",
        "\n\npath,label\n\na.png,1\n,,\n",
        " path , label \n a.png ,\t1\u00a0\n",
        '"path","label"\n"a.png", "1"\n',
        "PATH,Label\na.png,1\n",
        ",path,label\n0,a.png,1\n",  # an index of pandas
    ],
)
def test_spaces_blank_rows_and_the_marks_of_other_programs_are_no_content(tmp_path, text, capsys):
    columns = read(tmp_path, text).columns
    assert (columns["path"], columns["label"]) == (["a.png"], ["1"])
    assert "not used" not in capsys.readouterr().err


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("path,label,slide_id", "using column slide_id as group"),
        ("path,label,Slide ID", "using column Slide ID as group"),
        ("File Name,Class,case_id", "using columns File Name as path, Class as label, case_id as group"),
        ("path,label,groups", "using column groups as group"),
    ],
)
def test_a_column_of_another_name_is_used_and_said(tmp_path, capsys, header, said):
    columns = read(tmp_path, f"{header}\na.png,1,s1\nb.png,0,s2\n").columns
    assert (columns["path"], columns["label"], columns["group"]) == (["a.png", "b.png"], ["1", "0"], ["s1", "s2"])
    assert said in capsys.readouterr().err


def test_of_patients_and_slides_the_patients_are_the_groups(tmp_path, capsys):
    table = read(tmp_path, "path,label,slide_id,patient_id\na,1,s1,p\nb,0,s2,p\n")
    assert table.columns["group"] == ["p", "p"]
    said = capsys.readouterr().err
    assert "using column patient_id as group" in said
    assert "columns not used: slide_id" in said


def test_the_name_itself_comes_before_any_other(tmp_path):
    assert read(tmp_path, "path,class,label\na,x,1\n").columns["label"] == ["1"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,label,gruop", "a column 'gruop' and none called 'group'"),
        ("path,label,spilt", "a column 'spilt' and none called 'split'"),
        ("path,lable,group", r"lacks the column label; .* Is 'lable' meant\?"),
        ("path,class,target", "'class' and 'target', and each could be the column 'label'"),
        ("path,label,label", "two columns 'label'"),
    ],
)
def test_a_column_that_may_be_meant_is_refused(tmp_path, header, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, f"{header}\na.png,1,x\n")


def test_an_unquoted_line_break_or_a_repeated_header_is_refused(tmp_path):
    with pytest.raises(UserError, match="line 3: no readable table"):
        read(tmp_path, 'path,label\na.png,"1\nb.png,0\n')
    with pytest.raises(UserError, match="line 3: the header is repeated"):
        read(tmp_path, "path,label\na.png,1\npath,label\nb.png,0\n")


def test_splits_are_read_by_their_usual_names_and_validation_is_explained(capsys):
    where = list("abcdef")
    cells = ["Train", "TEST", "val", "NA", "training", "validation"]
    splits = read_splits(cells, source="t.csv", where=where)
    assert splits == ["train", "test", "train", "", "train", "train"]
    assert "2 patches of the validation split count as training patches" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"an unknown split in 1 of 2 rows \(b \(3\)\)"):
        read_splits(["train", "3"], source="t.csv", where=["a", "b"])


def test_the_widest_column_that_knows_most_rows_is_the_group(tmp_path, capsys):
    table = read(tmp_path, "path,label,slide,patient\na,1,s1,\nb,0,s2,\nc,1,s2,p\n")
    assert table.columns["group"] == ["s1", "s2", "s2"]
    assert "using column slide as group" in capsys.readouterr().err
    table = read(tmp_path, "path,label,case_id,slide_id\na,1,c1,s1\nb,0,c2,s1\nc,1,c3,s1\n")
    assert table.columns["group"] == ["s1"] * 3


def test_names_of_rows_without_a_header_are_r_s(tmp_path):
    assert read(tmp_path, '"path","label"\n"1","a.png","x"\n"2","b.png","y"\n').columns["path"] == ["a.png", "b.png"]


def test_rows_in_no_split_are_counted(capsys):
    assert read_splits(["train", "", "train"], source="t.csv", where=list("abc")) == ["train", "", "train"]
    assert "1 patches are in no split" in capsys.readouterr().err
    read_splits(["", ""], source="t.csv", where=list("ab"))
    assert capsys.readouterr().err == ""
